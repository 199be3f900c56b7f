/**
 * An embedded mesh: the coordinator as a child process that lives exactly as long as we do.
 *
 * The child holds the reading end of our pipe (`--end-with-parent`): when the pipe closes, by
 * close() or because this process died in whatever way, the coordinator ends its workers, its
 * nats-server and itself. It has a process group of its own, so that a terminal's Ctrl-C reaches
 * only us, and we decide.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readFileSync, renameSync, statSync } from 'node:fs'
import { extname, join } from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { JoinLine } from './client.js'
import { type Endpoint, parseEndpoint } from './endpoint.js'

export interface EmbeddedOptions {
  stateDir: string
  numWorkers: number
  /** 0: the coordinator divides the processors among its workers. */
  threadsPerWorker?: number
  /** "auto" (a GPU where there is one), "cpu", "cuda:0" and so on. */
  device?: string | undefined
  /** 0: any free port; null: no dashboard. */
  dashboardPort?: number | null
  grpcPort?: number
  /** HOST or HOST:PORT where workers of other hosts may join; absent: loopback only. */
  listen?: string | undefined
  /** How long the join line counts. */
  tokenTtlSeconds?: number | undefined
  natsServerPath?: string | undefined
  /** Only looks at the state folder: what is queued there stays queued. */
  isHeld?: boolean
  signal?: AbortSignal | undefined
}

export interface EmbeddedCoordinator {
  endpoint: Endpoint
  /** null: it listens on loopback only. */
  join: JoinLine | null
  logPath: string
  /** Settles when the child has ended, by close() or on its own. */
  ended: Promise<void>
  /** Lets the coordinator end its children and itself; after `graceMs` it is killed. */
  close(graceMs?: number): Promise<void>
}

const readyTimeoutMs = 60_000
const defaultGraceMs = 15_000
const maxLogBytes = 8 << 20

export async function startEmbedded(options: EmbeddedOptions): Promise<EmbeddedCoordinator> {
  const log = openLog(options.stateDir)
  const child = spawn(process.execPath, nodeArgs('coordinator', argsOf(options)), {
    stdio: ['pipe', 'pipe', log.file],
    detached: true,
  })
  closeSync(log.file)
  const ended = new Promise<void>((resolve) => {
    child.once('close', () => resolve())
    child.once('error', () => resolve())
  })
  // The child may end first; a pipe that broke then is not news.
  child.stdin?.on('error', () => {})
  const close = (graceMs = defaultGraceMs) => endChild(child, ended, graceMs)
  try {
    const line = await readyLine(child, ended, options.signal)
    const endpoint = line === null ? null : parseEndpoint(JSON.stringify({ pid: 0, ...line }))
    if (endpoint === null) throw startFailure(line, log)
    const pid = child.pid ?? 0
    const join = (line?.join ?? null) as JoinLine | null
    return { endpoint: { ...endpoint, pid }, join, logPath: log.path, ended, close }
  } catch (error) {
    await close()
    throw error
  }
}

/**
 * Arguments of node for one of our programs: from build/ as it is, from the sources through tsx.
 */
export function nodeArgs(program: 'coordinator' | 'worker', args: string[]): string[] {
  const extension = extname(fileURLToPath(import.meta.url))
  const main = fileURLToPath(new URL(`../${program}/main${extension}`, import.meta.url))
  return extension === '.ts' ? [...process.execArgv, main, ...args] : [main, ...args]
}

function argsOf(options: EmbeddedOptions): string[] {
  const args = ['--state-dir', options.stateDir, '--workers', String(options.numWorkers)]
  if (options.threadsPerWorker) {
    args.push('--threads-per-worker', String(options.threadsPerWorker))
  }
  if (options.device) args.push('--device', options.device)
  if (options.dashboardPort === null) args.push('--no-dashboard')
  else args.push('--dashboard-port', String(options.dashboardPort ?? 0))
  args.push('--grpc-port', String(options.grpcPort ?? 0))
  if (options.listen) args.push('--listen', options.listen)
  if (options.tokenTtlSeconds) args.push('--token-ttl', String(options.tokenTtlSeconds))
  if (options.natsServerPath) args.push('--nats-server', options.natsServerPath)
  if (options.isHeld) args.push('--hold')
  args.push('--end-with-parent')
  return args
}

interface Log {
  path: string
  file: number
  /** What earlier runs wrote ends here. */
  startBytes: number
}

/** Appends to one log a state folder; the one before it is kept once it has grown too long. */
function openLog(stateDir: string): Log {
  const dir = join(stateDir, 'logs')
  mkdirSync(dir, { recursive: true, mode: 0o700 })
  const path = join(dir, 'coordinator.log')
  const size = statSync(path, { throwIfNoEntry: false })?.size ?? 0
  if (size > maxLogBytes) renameSync(path, `${path}.1`)
  const startBytes = size > maxLogBytes ? 0 : size
  return { path, file: openSync(path, 'a', 0o600), startBytes }
}

/** The first JSON object on stdout, or null when the child ended without one. */
async function readyLine(
  child: ChildProcess,
  ended: Promise<void>,
  signal: AbortSignal | undefined,
): Promise<Record<string, unknown> | null> {
  if (!child.stdout) return null
  const lines = createInterface({ input: child.stdout })
  let timer: NodeJS.Timeout | undefined
  let abort = () => {}
  try {
    return await new Promise((resolve, reject) => {
      timer = setTimeout(() => reject(notReady()), readyTimeoutMs)
      abort = () => reject(new TunemeshError('JOB_STOPPED', 'Interrupted while starting.'))
      if (signal?.aborted) abort()
      signal?.addEventListener('abort', abort, { once: true })
      lines.on('line', (text) => {
        const line = jsonObject(text)
        if (line !== null) resolve(line)
      })
      void ended.then(() => resolve(null))
    })
  } finally {
    clearTimeout(timer)
    signal?.removeEventListener('abort', abort)
    lines.close()
    // Nothing more is read from it, but a full pipe must never block the child.
    child.stdout.resume()
  }
}

function jsonObject(text: string): Record<string, unknown> | null {
  try {
    const value: unknown = JSON.parse(text)
    return typeof value === 'object' ? (value as Record<string, unknown> | null) : null
  } catch {
    return null // a line of text for people
  }
}

const notReady = () =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `The embedded coordinator was not ready after ${readyTimeoutMs / 1000} s. See its log.`,
  )

/** What the coordinator said before it gave up: its error line, else the end of its log. */
function startFailure(line: Record<string, unknown> | null, log: Log): TunemeshError {
  const written = readFileSync(log.path).subarray(log.startBytes).toString()
  return (
    errorIn(line) ??
    written
      .split('\n')
      .map(jsonObject)
      .map(errorIn)
      .find((error) => error !== null) ??
    errorInText(written) ??
    new TunemeshError('INTERNAL', `The embedded coordinator ended at once. See ${log.path}`, {
      details: written.trim().split('\n').slice(-5),
    })
  )
}

function errorIn(line: Record<string, unknown> | null): TunemeshError | null {
  if (line === null) return null
  const told = (line.error ?? line.err ?? line) as Record<string, unknown>
  const { code, message, details } = told
  if (!isErrorCode(code) || typeof message !== 'string') return null
  return new TunemeshError(code, message, {
    details: Array.isArray(details) ? details.map(String) : [],
  })
}

function errorInText(text: string): TunemeshError | null {
  for (const [, code, message] of text.matchAll(/^([A-Z_]+):? (.+)$/gm)) {
    if (isErrorCode(code) && message) return new TunemeshError(code, message)
  }
  return null
}

async function endChild(child: ChildProcess, ended: Promise<void>, graceMs: number): Promise<void> {
  child.stdin?.end()
  const timer = setTimeout(() => killGroup(child), graceMs)
  await ended
  clearTimeout(timer)
}

/** The whole group: the coordinator and whatever it started. */
function killGroup(child: ChildProcess): void {
  try {
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
  }
}
