/** `tunemesh worker`: one worker process on this machine, joined to a coordinator. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs'
import { availableParallelism, hostname } from 'node:os'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { assertLoopback, isLoopback } from '../client/client.js'
import { nodeArgs } from '../client/embedded.js'
import { isProcessAlive, namedEndpoint } from '../client/endpoint.js'
import { type JoinOptions, joinMesh, parseJoinUrl } from '../client/join.js'
import { JoinedHost } from '../client/joined-host.js'
import { withPatience } from '../client/retry.js'
import { lastErrorIn, OutputTail } from '../proto/error-line.js'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { escapeLine } from './escape.js'
import { findEndpoint } from './mesh.js'

export interface WorkerOptions {
  join?: string | undefined
  token?: string | undefined
  threads?: number | undefined
  device?: string | undefined
  /** Seconds that a coordinator may be away. */
  wait: number
}

export async function worker(context: Context, options: WorkerOptions): Promise<void> {
  const way = await wayTo(context, options)
  try {
    await runBy(way, context, options)
  } catch (error) {
    if (!isRevoked(error) || way.joined === null) throw error
    way.joined.forget()
    if (options.token === undefined) throw error
    // The token may be newer than what it kept; where it is the one it joined by, it is used up.
    const again = await wayTo(context, options).catch(() => Promise.reject(error))
    await runBy(again, context, options)
  }
}

const isRevoked = (error: unknown) =>
  error instanceof TunemeshError && error.code === 'HOST_REVOKED'

async function runBy(way: Way, context: Context, options: WorkerOptions): Promise<void> {
  const { workDir, place } = newPlace(context.stateDir, options.device ?? 'auto')
  const args = [
    '--coordinator',
    way.address,
    ...(way.joined === null ? ['--token-file', '/dev/fd/3'] : ['--joined', way.joined.path]),
    '--threads',
    String(options.threads ?? availableParallelism()),
    '--work-dir',
    workDir,
    '--device',
    options.device ?? 'auto',
    '--place',
    place,
    '--give-up-after',
    String(options.wait),
    '--end-with-parent',
  ]
  const as = way.joined === null ? '' : ` as ${way.joined.hostId}`
  context.output.note(`Joining ${way.address}${as}. Ctrl-C leaves after the step under way.`)
  try {
    await keepRunning(context, () => {
      // The one before has cleared up after itself.
      mkdirSync(workDir, { recursive: true, mode: 0o700 })
      return launch(context, way, args)
    })
  } finally {
    rmSync(workDir, { recursive: true, force: true })
  }
}

function launch(context: Context, way: Way, args: readonly string[]): ChildProcess {
  // The token is neither in argv nor in a file that anyone else could open.
  const tokenFd = way.joined === null ? openSecret(context.stateDir, way.token) : null
  const child = spawn(process.execPath, nodeArgs('worker', [...args]), {
    stdio: ['pipe', 'pipe', 'pipe', tokenFd ?? 'ignore'],
    detached: true,
  })
  if (tokenFd !== null) closeSync(tokenFd)
  child.stdin?.on('error', () => {})
  showLog(context, child)
  return child
}

/** So many processes in a row, none of which lasted, and the device needs a person. */
const maxDeviceFailures = 8
const lastingMs = 60_000

/**
 * A device's error stays with its process: another one goes on.
 *
 * @throws what the last one said, where it was not that or too often
 */
export async function keepRunning(
  context: Pick<Context, 'output' | 'interrupts'>,
  start: () => ChildProcess,
): Promise<void> {
  for (let inARow = 1; ; inARow++) {
    const startedMs = performance.now()
    try {
      return await untilEnded(context, start())
    } catch (error) {
      if (!(error instanceof TunemeshError) || error.code !== 'DEVICE_FAILED') throw error
      if (performance.now() - startedMs > lastingMs) inARow = 1
      if (inARow >= maxDeviceFailures) throw error
      context.output.note(`${escapeLine(error.message)} A new worker process takes its place.`)
    }
  }
}

/** The worker's log, which is JSON, in words; what ended it is told by this command's own error. */
function showLog({ output }: Context, { stderr }: ChildProcess): void {
  if (stderr === null) return
  createInterface({ input: stderr }).on('line', (line) => {
    const message = messageIn(line)
    const [code] = message.split(' ', 1)
    if (!isErrorCode(code)) output.note(escapeLine(message))
  })
}

/** Of one line of the log; a line that is not of it, such as a library's, is its own message. */
function messageIn(line: string): string {
  try {
    const { msg } = JSON.parse(line) as { msg?: unknown }
    return typeof msg === 'string' ? msg : line
  } catch {
    return line
  }
}

/**
 * One folder a process; what killed ones have left behind goes with the next start. The place is
 * the first that no live process with the same --device has: a restarted one finds its own again.
 */
export function newPlace(stateDir: string, device: string): { workDir: string; place: string } {
  const parent = join(stateDir, 'workers')
  mkdirSync(parent, { recursive: true, mode: 0o700 })
  const taken = new Set<string>()
  for (const name of readdirSync(parent)) {
    const [pid, ...told] = name.split('.')
    if (!isProcessAlive(Number(pid))) rmSync(join(parent, name), { recursive: true, force: true })
    else taken.add(told.join('.'))
  }
  // A part of a file's name, and of what the coordinator is told.
  const kind = device.replace(/[^a-z0-9]/gi, '')
  let number = 1
  while (taken.has(`${kind}.${number}`)) number++
  const workDir = join(parent, `${process.pid}.${kind}.${number}`)
  mkdirSync(workDir, { recursive: true, mode: 0o700 })
  return { workDir, place: `joined-${number}` }
}

interface Way {
  address: string
  /** Of a coordinator of this machine; unused where the host has joined. */
  token: string
  joined: JoinedHost | null
}

async function wayTo(context: Context, options: WorkerOptions): Promise<Way> {
  if (options.join !== undefined) return namedWay(context, options.join, options)
  const endpoint = await findEndpoint(context)
  if (endpoint !== null) {
    assertLoopback(endpoint.grpc)
    return { address: endpoint.grpc, token: endpoint.token, joined: null }
  }
  throw new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `No coordinator runs on ${context.stateDir}. Start one with \`tunemesh up\`, ` +
      'or name one by the join line that it printed: --join URL --token TOKEN.',
  )
}

/** A host that has joined before needs no token; plain text is spoken on this machine only. */
async function namedWay(
  context: Context,
  url: string,
  { token: joinToken, wait }: WorkerOptions,
): Promise<Way> {
  const { stateDir, token: ownersToken } = context
  const { address, isTls } = parseJoinUrl(url)
  const nowMs = Date.now()
  if (joinToken !== undefined) {
    const options = { address, token: joinToken, stateDir, hostName: hostname(), nowMs }
    return { address, token: '', joined: await joinPatiently(context, options, wait) }
  }
  const joined = JoinedHost.read(JoinedHost.pathFor(stateDir, address))
  if (joined !== null) {
    joined.assertValid(nowMs)
    return { address, token: '', joined }
  }
  if (isTls || !isLoopback(address)) {
    throw new TunemeshError(
      'TLS_REQUIRED',
      `This host has not joined ${address}, which speaks TLS with such hosts only. Give the ` +
        "--token of the join line; `tunemesh token` on the coordinator's machine prints one.",
    )
  }
  return { address, token: namedEndpoint(address, ownersToken).token, joined: null }
}

/** The coordinator may be started later than its workers. */
async function joinPatiently(
  { output, interrupts }: Context,
  options: JoinOptions,
  waitSeconds: number,
): Promise<JoinedHost> {
  const leave = new AbortController()
  const stopped = new TunemeshError('JOB_STOPPED', 'Interrupted while joining.')
  const restore = interrupts.handle(() => leave.abort(stopped))
  const onFailure = ({ message }: TunemeshError, failures: number) => {
    if (failures > 1) return
    const { address } = options
    output.note(`${address} can not be reached: ${message} Trying for ${waitSeconds} s.`)
  }
  const patience = { patienceMs: waitSeconds * 1000, signal: leave.signal, onFailure }
  try {
    return await withPatience(() => joinMesh(options), patience)
  } finally {
    restore()
  }
}

/** An open file that has no name any more: the child reads it through its descriptor. */
function openSecret(stateDir: string, token: string): number {
  mkdirSync(stateDir, { recursive: true, mode: 0o700 })
  const path = join(stateDir, `.token.${process.pid}`)
  const file = openSync(path, 'wx+', 0o600)
  rmSync(path)
  writeSync(file, `${token}\n`)
  return file
}

/** The first interrupt lets the worker drain; the second one kills it. */
async function untilEnded(
  context: Pick<Context, 'output' | 'interrupts'>,
  child: ChildProcess,
): Promise<void> {
  let isWanted = true
  const said = child.stdout && new OutputTail(child.stdout)
  const restore = context.interrupts.handle((count) => {
    isWanted = false
    if (count === 1) {
      context.output.note('Leaving after the step under way. Press Ctrl-C again to leave at once.')
    }
    child.kill(count === 1 ? 'SIGTERM' : 'SIGKILL')
  })
  const how = await new Promise<string | null>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code, signal) => resolve(code === 0 ? null : (signal ?? `code ${code}`)))
  }).finally(restore)
  if (how !== null && isWanted) {
    const told = lastErrorIn(said?.text ?? '')
    if (told !== null) throw told
    throw new TunemeshError('WORKER_FAILED', `The worker ended with ${how}; its words are above.`)
  }
}
