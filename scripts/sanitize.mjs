// node scripts/sanitize.mjs [--plugin FILE] [--programs DIR] [--tool memcheck|racecheck]
//   [--only WORD] [--jobs N]
// ./tunemesh dev sanitize …      in the bundle
//
// The CUDA kernels under NVIDIA's compute-sanitizer, each at a few odd shapes, and a table of what
// it found. First a run with a known error, which it must see: a sanitizer that looks at nothing
// finds nothing. Only the plugin's own kernels are looked at, where it can tell them by name:
// libraries' are not ours to mend.
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { delimiter, join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { top } from './tools.mjs'

const secondsEach = 60
const { values } = parseArgs({
  options: {
    plugin: { type: 'string', default: join(top, 'build/native/tunemesh_cuda.so') },
    programs: { type: 'string', default: join(top, 'build/native-cmake') },
    tool: { type: 'string', multiple: true, default: ['memcheck', 'racecheck'] },
    only: { type: 'string', default: '' },
    jobs: { type: 'string', default: String(Math.min(4, availableParallelism())) },
  },
})

const operations = [
  'embedding',
  'rms norm',
  'bias',
  'rope',
  'swiglu',
  'cross entropy',
  'attention',
  'linear',
]
const small = ['--small', '--no-failures']
/** Each well within `secondsEach`; the operations that have no case of their own come last. */
const selections = [
  ...['fp32', 'bf16'].flatMap((precision) => [
    ...operations.map((name) => ({
      program: 'cuda_ops_test',
      options: [...small, '--precision', precision, '--only', name],
    })),
    { program: 'cuda_ops_test', options: [...small, '--precision', precision, '--rest'] },
    { program: 'groups_test', options: ['--small', '--precision', precision] },
  ]),
  { program: 'fp8_test', options: ['--small'] },
  { program: 'quantise_test', options: ['--small'] },
  { program: 'cuda_exchange_test', options: ['--small'] },
]

function skip(message) {
  console.log(`${message}\nsanitize: 0 passed, 0 failed, 1 skipped`)
  process.exit(0)
}

/** Beside nvcc, where a toolkit is; NVIDIA's wheels do not have it. */
function findSanitizer() {
  const folders = (process.env.PATH ?? '').split(delimiter)
  const roots = [process.env.CUDA_HOME, process.env.CUDA_PATH, '/usr/local/cuda']
  if (existsSync('/usr/local'))
    for (const name of readdirSync('/usr/local'))
      if (name.startsWith('cuda-')) roots.push(join('/usr/local', name))
  for (const root of roots)
    if (root) folders.push(join(root, 'bin'), join(root, 'compute-sanitizer'))
  const found = folders.map((folder) => join(folder, 'compute-sanitizer')).find(existsSync)
  return found ?? skip(`skipped: no compute-sanitizer. Sought in: ${folders.join(', ')}`)
}

/** By a part of their names; empty once the tool has turned out not to take that. */
let filter = ['--kernel-name', 'kernel_substring=tunemesh']

/** What one selection under one tool came to. */
function sanitized(sanitizer, tool, { program, options }) {
  const path = join(resolve(values.programs), program)
  const args = ['--tool', tool, ...filter, '--print-limit', '20', path]
  const startedMs = Date.now()
  return new Promise((done) => {
    const child = spawn('timeout', [
      String(secondsEach),
      sanitizer,
      ...args,
      resolve(values.plugin),
      ...options,
    ])
    let text = ''
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (data) => (text += data))
    child.once('error', (error) => done({ text: String(error), status: null, seconds: 0 }))
    child.once('close', (status) =>
      done({ text, status, seconds: (Date.now() - startedMs) / 1000 }),
    )
  })
}

/** Its own count, as `ERROR SUMMARY: 0 errors` or `RACECHECK SUMMARY: 0 hazards displayed (…)`. */
function verdictOf({ text, status }) {
  const summary = /(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)/.exec(text)
  const tests = /(\d+) passed, (\d+) failed/.exec(text)
  const skipped = /^skipped: .*/m.exec(text)
  if (skipped) return { outcome: 'skipped', note: skipped[0] }
  if (status === 124) return { outcome: 'FAILED', note: `not done in ${secondsEach} s` }
  if (!summary || !tests) return { outcome: 'FAILED', note: 'no summary' }
  const found = Number(summary[1])
  const checks = `${tests[1]} checks passed, ${tests[2]} failed`
  const isClean = found === 0 && tests[1] !== '0' && tests[2] === '0'
  return { outcome: isClean ? 'ok' : 'FAILED', note: `${found} found; ${checks}`, found }
}

const nameOf = ({ program, options }) =>
  [program, ...options.filter((word) => !small.includes(word))].join(' ')

function print(tool, name, seconds, { outcome, note }) {
  const time = `${seconds.toFixed(1)} s`.padStart(8)
  console.log(`${outcome.padEnd(8)}${tool.padEnd(11)}${name.padEnd(58)}${time}  ${note}`)
}

const tail = (text) => text.trimEnd().split('\n').slice(-30).join('\n')

/** A read and a write of memory that is nobody's. */
async function checkThatItSees(sanitizer) {
  const run = await sanitized(sanitizer, 'memcheck', {
    program: 'cuda_fault_test',
    options: ['--provoke'],
  })
  const { found = 0, outcome, note } = verdictOf(run)
  if (outcome === 'skipped') skip(note)
  const sees = found > 0
  print('memcheck', 'an error that is there', run.seconds, {
    outcome: sees ? 'ok' : 'FAILED',
    note: sees ? `${found} found` : 'not seen',
  })
  if (!sees) console.log(tail(run.text))
  return sees
}

const sanitizer = findSanitizer()
console.log(
  spawnSync(sanitizer, ['--version'], { encoding: 'utf8' }).stdout.trim().split('\n').at(-1),
)
let sees = await checkThatItSees(sanitizer)
if (!sees) {
  console.log('once more, with kernels of all names')
  filter = []
  sees = await checkThatItSees(sanitizer)
}
let numFailed = sees ? 0 : 1
const waiting = values.tool.flatMap((tool) =>
  selections.filter((run) => nameOf(run).includes(values.only)).map((run) => ({ tool, run })),
)
let numPassed = 0
async function work() {
  for (let next = waiting.shift(); next; next = waiting.shift()) {
    const done = await sanitized(sanitizer, next.tool, next.run)
    const verdict = verdictOf(done)
    print(next.tool, nameOf(next.run), done.seconds, verdict)
    if (verdict.outcome === 'ok') ++numPassed
    else {
      ++numFailed
      console.log(tail(done.text))
    }
  }
}
await Promise.all(Array.from({ length: Number(values.jobs) }, work))
console.log(`sanitize: ${numPassed} passed, ${numFailed} failed`)
process.exit(numFailed === 0 ? 0 : 1)
