// npm test: C++ programs, then every TypeScript test file in a process of its own. The last line
// says what ran. --no-skips: a skipped test fails the run, except those that say they need a folder
// outside the clone, or a GPU.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setupNatsServer } from './nats-setup.mjs'
import { top } from './tools.mjs'

const allowsSkips = !process.argv.includes('--no-skips')
const wanted = process.argv.slice(2).filter((name) => !name.startsWith('--'))

function testFiles(dir) {
  const found = []
  for (const entry of readdirSync(dir, { withFileTypes: true })) {
    const path = join(dir, entry.name)
    if (entry.isDirectory()) found.push(...testFiles(path))
    else if (entry.name.endsWith('.test.js')) found.push(path)
  }
  return found
}

function runNative(total) {
  const dir = join(top, 'build/native-cmake')
  for (const name of readdirSync(dir).filter((file) => file.endsWith('_test'))) {
    if (wanted.length > 0 && !wanted.some((word) => `test/native/${name}`.includes(word))) continue
    const done = spawnSync(join(dir, name), { cwd: top, encoding: 'utf8', maxBuffer: 1 << 26 })
    const count = /(\d+) passed, (\d+) failed(?:, (\d+) skipped)?/.exec(done.stdout ?? '')
    const skips = (done.stdout ?? '').split('\n').filter((line) => /^\s*skipped\b/.test(line))
    total.skipped.push(...skips.map((line) => `${name}: ${line.trim()}`))
    const failed = count ? Number(count[2]) : 1
    total.passed += count ? Number(count[1]) : 0
    total.failed += failed === 0 && done.status !== 0 ? 1 : failed
    if (done.status !== 0 || !count) {
      total.failures.push(`${name} (status ${done.status ?? done.signal})`)
      console.log(done.stdout, done.stderr)
    }
    console.log(`${name}: ${count?.[0] ?? 'no closing line'}`)
  }
}

/** One TAP report beside the readable one: from it the counts and the names of what was skipped. */
async function runTypescript(total) {
  const files = testFiles(join(top, 'build/test')).filter(
    (file) => wanted.length === 0 || wanted.some((word) => file.includes(word)),
  )
  if (files.length === 0) return
  const temporary = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  const report = join(temporary, 'report.tap')
  const reporters = [
    '--test-reporter=spec',
    '--test-reporter-destination=stdout',
    '--test-reporter=tap',
    `--test-reporter-destination=${report}`,
  ]
  const child = spawn(
    process.execPath,
    ['--test', '--test-concurrency=2', '--test-timeout=240000', ...reporters, ...files],
    { cwd: top, stdio: 'inherit' },
  )
  const status = await new Promise((resolve) => child.on('exit', resolve))
  const tap = existsSync(report) ? readFileSync(report, 'utf8') : ''
  rmSync(temporary, { recursive: true, force: true })
  const count = (name) => Number(new RegExp(`^# ${name} (\\d+)`, 'm').exec(tap)?.[1] ?? 0)
  total.passed += count('pass')
  total.failed += count('fail') + count('cancelled')
  total.skipped.push(
    ...[...tap.matchAll(/^\s*ok \d+ - (.*?) # SKIP ?(.*)$/gm)].map(
      (match) => `${match[1]}: ${match[2]}`,
    ),
  )
  if (status !== 0 && count('fail') + count('cancelled') === 0) {
    total.failed += 1
    total.failures.push(`node --test ended with ${status}`)
  }
}

process.env.TUNEMESH_NATS_SERVER ??= await setupNatsServer()
const total = { passed: 0, failed: 0, skipped: [], failures: [] }
runNative(total)
await runTypescript(total)
for (const line of total.failures) console.log(`failed: ${line}`)
for (const line of total.skipped) console.log(`skipped: ${line}`)
const needsGpu = /^\w+_test: skipped: no CUDA device\b/
const gpuSkips = total.skipped.filter((line) => needsGpu.test(line))
const badSkips = total.skipped.filter(
  (line) => !line.includes('outside the clone') && !needsGpu.test(line),
)
if (gpuSkips.length > 0) console.log('the checks of a GPU did not run: this machine has none')
if (!allowsSkips && badSkips.length > 0)
  console.log(`${badSkips.length} tests were skipped, and here nothing may be`)
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped.length} skipped`)
process.exitCode =
  total.failed > 0 || total.passed === 0 || (!allowsSkips && badSkips.length > 0) ? 1 : 0
