/** `tunemesh worker`: one worker process on this machine, joined to a coordinator. */
import { type ChildProcess, spawn } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { assertLoopback } from '../client/client.js'
import { nodeArgs } from '../client/embedded.js'
import { type Endpoint, isProcessAlive, namedEndpoint } from '../client/endpoint.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { findEndpoint } from './mesh.js'

export interface WorkerOptions {
  join?: string | undefined
  threads?: number | undefined
}

export async function worker(context: Context, options: WorkerOptions): Promise<void> {
  const endpoint = await endpointFor(context, options)
  assertLoopback(endpoint.grpc)
  const workDir = newWorkDir(context.stateDir)
  const tokenFd = openSecret(context.stateDir, endpoint.token)
  const args = [
    '--coordinator',
    endpoint.grpc,
    // The token is neither in argv nor in a file that anyone else could open.
    '--token-file',
    '/dev/fd/3',
    '--threads',
    String(options.threads ?? availableParallelism()),
    '--work-dir',
    workDir,
    '--end-with-parent',
  ]
  const child = spawn(process.execPath, nodeArgs('worker', args), {
    stdio: ['pipe', 'inherit', 'inherit', tokenFd],
    detached: true,
  })
  closeSync(tokenFd)
  child.stdin?.on('error', () => {})
  context.output.note(`Joining ${endpoint.grpc}. Ctrl-C leaves after the step under way.`)
  try {
    await untilEnded(context, child)
  } finally {
    rmSync(workDir, { recursive: true, force: true })
  }
}

/** One folder a process; what killed ones have left behind goes with the next start. */
function newWorkDir(stateDir: string): string {
  const parent = join(stateDir, 'workers')
  mkdirSync(parent, { recursive: true, mode: 0o700 })
  for (const name of readdirSync(parent)) {
    if (!isProcessAlive(Number(name))) rmSync(join(parent, name), { recursive: true, force: true })
  }
  const dir = join(parent, String(process.pid))
  mkdirSync(dir, { recursive: true, mode: 0o700 })
  return dir
}

async function endpointFor(context: Context, options: WorkerOptions): Promise<Endpoint> {
  if (options.join !== undefined) return namedEndpoint(options.join, context.token)
  const endpoint = await findEndpoint(context)
  if (endpoint !== null) return endpoint
  throw new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `No coordinator runs on ${context.stateDir}. Start one with \`tunemesh up\`, ` +
      'or name one: --join HOST:PORT --token-file PATH.',
  )
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
async function untilEnded(context: Context, child: ChildProcess): Promise<void> {
  let isWanted = true
  const restore = context.interrupts.handle((count) => {
    isWanted = false
    if (count === 1) {
      context.output.note('Leaving after the step under way. Press Ctrl-C again to leave at once.')
    }
    child.kill(count === 1 ? 'SIGTERM' : 'SIGKILL')
  })
  const how = await new Promise<string | null>((resolve, reject) => {
    child.once('error', reject)
    child.once('exit', (code, signal) => resolve(code === 0 ? null : (signal ?? `code ${code}`)))
  }).finally(restore)
  if (how !== null && isWanted) {
    throw new TunemeshError('WORKER_FAILED', `The worker ended with ${how}; its words are above.`)
  }
}
