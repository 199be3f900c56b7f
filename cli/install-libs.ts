/**
 * `tunemesh doctor --install-libs DIR`: NVIDIA's cuBLASLt and cuDNN without Python, or with pip
 * where there is one. Everything grows in DIR.part and is renamed when it is whole; a run that
 * was cut off goes on from what is there.
 */
import { execFile, spawn } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { mkdir, readdir, rename, rm, statfs, writeFile } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'
import { promisify } from 'node:util'
import cliProgress from 'cli-progress'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { formatBytes } from './format.js'
import { libraryWheels, type Wheel } from './library-wheels.js'
import { bytesOf, checkWheel, downloadWheel, shown } from './package-index.js'
import { unpackWheel } from './wheel-archive.js'

export interface InstallOptions {
  folder: string
  /** Of a package index; undefined: PIP_INDEX_URL, or pip with its own configuration. */
  index: string | undefined
  /** What is installed; tests have smaller ones. */
  wheels?: readonly Wheel[]
}

type Source = { kind: 'pip' } | { kind: 'index'; url: URL }

/** In the folder: whose it is, and what it holds. */
const recordName = 'tunemesh-libraries.json'
const spareBytes = 64 << 20

/** @returns the folder's absolute path */
export async function installLibs(context: Context, options: InstallOptions): Promise<string> {
  const { output } = context
  const wheels = options.wheels ?? libraryWheels
  const folder = resolve(options.folder)
  const record = recordOf(wheels)
  if (await isWhole(folder, record)) {
    output.line(`The libraries are in ${folder} already.`)
    return folder
  }
  const source = await chooseSource(options.index, context.env)
  const part = `${folder}.part`
  await mkdir(join(part, 'lib'), { recursive: true })
  const unlock = await lock(part)
  try {
    await needSpace(part, wheels)
    for (const wheel of wheels) await installWheel(context, { wheel, part, source })
    await writeFile(join(part, 'lib', recordName), record)
    await putInPlace(join(part, 'lib'), folder)
  } finally {
    await unlock()
  }
  await rm(part, { recursive: true, force: true })
  return folder
}

const recordOf = (wheels: readonly Wheel[]) =>
  `${JSON.stringify(wheels.map(({ name, version, sha256 }) => ({ name, version, sha256 })))}\n`

/** @throws OUTPUT_IN_USE for a folder with files of others */
async function isWhole(folder: string, record: string): Promise<boolean> {
  const files = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [] as string[]
    throw new TunemeshError('OUTPUT_IN_USE', `${folder}: ${error.message}. Give another folder.`)
  })
  if (files.length === 0) return false
  if (!files.includes(recordName)) {
    throw new TunemeshError(
      'OUTPUT_IN_USE',
      `${folder} holds other files (${files.slice(0, 3).join(', ')}). Give a folder that is ` +
        'empty or not there yet.',
    )
  }
  return readFileSync(join(folder, recordName), 'utf8') === record
}

async function chooseSource(index: string | undefined, env: NodeJS.ProcessEnv): Promise<Source> {
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    throw new TunemeshError(
      'LIBRARIES_NOT_FETCHED',
      `The wheels are for linux x64, this is ${process.platform} ${process.arch}. Install ` +
        'cuBLASLt and cuDNN from NVIDIA, and see docs/cuda.md for where they are looked for.',
    )
  }
  if (index !== undefined) return { kind: 'index', url: parseIndex(index, '--index') }
  if (await hasPip()) return { kind: 'pip' }
  if (env.PIP_INDEX_URL) {
    return { kind: 'index', url: parseIndex(env.PIP_INDEX_URL, 'PIP_INDEX_URL') }
  }
  throw new TunemeshError(
    'LIBRARIES_NOT_FETCHED',
    'Nowhere to fetch from: python3 with pip is not here, and neither --index URL nor ' +
      'PIP_INDEX_URL is given. Give the address of a Python package index (its "simple" folder).',
  )
}

function parseIndex(text: string, origin: string): URL {
  const url = URL.canParse(text) ? new URL(text) : null
  if (url?.protocol === 'https:' || url?.protocol === 'http:') return url
  throw new TunemeshError(
    'LIBRARIES_NOT_FETCHED',
    `${origin} is ${JSON.stringify(text)}, which is no http or https address. Give that of a ` +
      'Python package index (its "simple" folder).',
  )
}

async function hasPip(): Promise<boolean> {
  const call = promisify(execFile)('python3', ['-m', 'pip', '--version'], { timeout: 60_000 })
  return call.then(
    () => true,
    () => false,
  )
}

/** Two at once would write the same files; a lock whose process is gone is nobody's. */
async function lock(part: string): Promise<() => Promise<void>> {
  const path = join(part, 'lock')
  const take = () => writeFile(path, String(process.pid), { flag: 'wx' })
  try {
    await take()
  } catch {
    const owner = Number(readFileSync(path, 'utf8'))
    if (isAlive(owner)) {
      throw new TunemeshError(
        'OUTPUT_IN_USE',
        `Process ${owner} is installing into ${part} already. Wait for it, or end it.`,
      )
    }
    await rm(path, { force: true })
    await take()
  }
  return () => rm(path, { force: true })
}

function isAlive(pid: number): boolean {
  try {
    return pid > 0 && process.kill(pid, 0)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** Wheels come one after another, and each goes once it is unpacked. */
async function needSpace(part: string, wheels: readonly Wheel[]): Promise<void> {
  let kept = 0
  let needed = 0
  for (const wheel of wheels.filter((it) => !existsSync(doneMark(part, it)))) {
    const missing = wheel.sizeBytes - Math.min(wheel.sizeBytes, await bytesOf(fileOf(part, wheel)))
    kept += wheel.keptBytes
    needed = Math.max(needed, kept + missing)
  }
  const { bavail, bsize } = await statfs(part)
  const free = bavail * bsize
  if (free >= needed + spareBytes) return
  throw new TunemeshError(
    'DISK_FULL',
    `${dirname(part)} has ${formatBytes(free)} free, the libraries need ` +
      `${formatBytes(needed + spareBytes)}. Free some, or give a folder on another disk.`,
  )
}

const fileOf = (part: string, wheel: Wheel) => join(part, wheel.file)
const doneMark = (part: string, wheel: Wheel) => join(part, `${wheel.sha256}.done`)

interface WheelInstall {
  wheel: Wheel
  part: string
  source: Source
}

async function installWheel(context: Context, install: WheelInstall): Promise<void> {
  const { wheel, part, source } = install
  if (existsSync(doneMark(part, wheel))) return
  const path = fileOf(part, wheel)
  const title = `${wheel.name} ${wheel.version}`
  const from = source.kind === 'pip' ? 'pip' : shown(source.url)
  context.output.line(`${title}: ${formatBytes(wheel.sizeBytes)} from ${from}`)
  if ((await bytesOf(path)) === wheel.sizeBytes) await checkWheel(wheel, path)
  else if (source.kind === 'pip') await pipDownload(context, wheel, part)
  else await indexDownload(context, { wheel, part, index: source.url })
  const names = await unpackWheel(path, wheel.keep, join(part, 'lib'))
  if (names.length === 0) {
    throw new TunemeshError('WHEEL_CORRUPT', `${wheel.file} holds none of the libraries.`)
  }
  await writeFile(doneMark(part, wheel), '')
  await rm(path)
}

async function indexDownload(
  { output, interrupts }: Context,
  { wheel, part, index }: { wheel: Wheel; part: string; index: URL },
): Promise<void> {
  const stop = new AbortController()
  const end = interrupts.handle(() =>
    stop.abort(new TunemeshError('JOB_STOPPED', 'Interrupted; a new run goes on from here.')),
  )
  const bar = output.isTerminal ? downloadBar(output.stderr) : null
  bar?.start(wheel.sizeBytes, 0, { have: '0 B', all: formatBytes(wheel.sizeBytes) })
  try {
    await downloadWheel({
      index,
      wheel,
      path: fileOf(part, wheel),
      onProgress: (have) => bar?.update(have, { have: formatBytes(have) }),
      signal: stop.signal,
    })
  } finally {
    bar?.stop()
    end()
  }
}

const downloadBar = (stream: NodeJS.WriteStream) =>
  new cliProgress.SingleBar(
    {
      format: '{bar} {percentage} %  {have} of {all}  {eta_formatted} left',
      barCompleteChar: '━',
      barIncompleteChar: '┄',
      barsize: 24,
      hideCursor: true,
      clearOnComplete: true,
      gracefulExit: false,
      stream,
    },
    cliProgress.Presets.shades_classic,
  )

/** pip knows the index, proxies and certificates of this machine; it checks the hash as we do. */
async function pipDownload({ output }: Context, wheel: Wheel, part: string): Promise<void> {
  const requirements = join(part, 'requirements.txt')
  await writeFile(requirements, `${wheel.name}==${wheel.version} --hash=sha256:${wheel.sha256}\n`)
  const platforms = ['28', '27', '17', '12'].map((glibc) => `manylinux_2_${glibc}_x86_64`)
  const target = [...platforms, 'manylinux2014_x86_64', 'manylinux2010_x86_64']
  const pins = ['--only-binary=:all:', '--python-version', '3.12', '--implementation', 'cp']
  const args = ['-m', 'pip', 'download', '--no-deps', '--disable-pip-version-check', ...pins]
  args.push(...target.flatMap((platform) => ['--platform', platform]))
  args.push('--require-hashes', '-r', requirements, '-d', part)
  if (!output.isTerminal) args.push('--quiet')
  const told = await runPip(args, output.isTerminal ? 'inherit' : 'ignore')
  if (told === '' && (await bytesOf(fileOf(part, wheel))) > 0) {
    return checkWheel(wheel, fileOf(part, wheel))
  }
  throw new TunemeshError(
    told.includes('THESE PACKAGES DO NOT MATCH THE HASHES')
      ? 'WHEEL_CORRUPT'
      : 'LIBRARIES_NOT_FETCHED',
    `pip did not get ${wheel.name} ${wheel.version}: ${lastLine(told)}. Mend pip's index, or ` +
      'give another with --index URL.',
  )
}

/** What pip said where it failed, else nothing. */
function runPip(args: string[], stdout: 'inherit' | 'ignore'): Promise<string> {
  const child = spawn('python3', args, { stdio: ['ignore', stdout, 'pipe'] })
  let told = ''
  child.stderr?.on('data', (data: Buffer) => {
    told = (told + String(data)).slice(-8192)
  })
  return new Promise((settle) => {
    child.once('error', (error) => settle(error.message))
    child.once('close', (code) => settle(code === 0 ? '' : told || `status ${code}`))
  })
}

const lastLine = (text: string) => text.trim().split('\n').at(-1)?.trim() ?? ''

/** What stood there is ours (isWhole has seen to that), and of other versions. */
async function putInPlace(lib: string, folder: string): Promise<void> {
  const old = `${folder}.old`
  await rm(old, { recursive: true, force: true })
  if (existsSync(folder)) await rename(folder, old)
  await rename(lib, folder)
  await rm(old, { recursive: true, force: true })
}
