/**
 * The coordinator a verb talks to: the named one, the live one, or one of its own for as long as it
 * runs.
 */
import { availableParallelism } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { connect, type TunemeshClient } from '../client/client.js'
import { type EmbeddedCoordinator, startEmbedded } from '../client/embedded.js'
import { type Endpoint, liveEndpoint, namedEndpoint } from '../client/endpoint.js'
import { speaksTls } from '../client/tls-probe.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'

export interface MeshNeeds {
  /** Workers of an embedded mesh; a live coordinator has its own. */
  numWorkers: number
  /** 0: the processors divided among the workers. */
  threadsPerWorker?: number
  /** "auto", "cpu" or "cuda:N", for the workers of an embedded mesh. */
  device?: string | undefined
  hasDashboard?: boolean
  /** The verb only looks or asks: jobs that wait on the state folder go on waiting. */
  isHeld?: boolean
}

export interface Mesh {
  client: TunemeshClient
  endpoint: Endpoint
  isEmbedded: boolean
  /** Aborts when an embedded coordinator ends by itself: nothing more will come from it. */
  signal: AbortSignal
  /** After this the embedded mesh is given a second to end instead of its full grace. */
  hurry(): void
}

/** Grace after a second Ctrl-C. */
const hurriedGraceMs = 1_000
/** Another command's coordinator is starting or ending for less than this. */
const otherSettlesMs = 20_000
const lookAgainMs = 250
/** A command that only looks, `jobs` or `logs`, is over sooner than this. */
const lookerEndsMs = 10_000
/** Jobs looked through for such as wait; a state folder that has more queued is not expected. */
const maxListed = 1_000

export async function withMesh<T>(
  context: Context,
  needs: MeshNeeds,
  use: (mesh: Mesh) => Promise<T>,
): Promise<T> {
  const found = await findUsable(context, needs)
  const mesh = found ?? (await startOrFind(context, needs))
  if ('logPath' in mesh) return useEmbedded({ context, needs, embedded: mesh }, use)
  return useLive(context, mesh, use)
}

/** Starts none; null: none runs. */
export async function withLiveMesh<T>(
  context: Context,
  use: (mesh: Mesh) => Promise<T>,
): Promise<T | null> {
  const found = await findEndpoint(context)
  return found === null ? null : useLive(context, found, use)
}

async function useLive<T>(
  context: Context,
  mesh: Endpoint,
  use: (mesh: Mesh) => Promise<T>,
): Promise<T> {
  const client = connectTo(context, mesh)
  const { signal } = new AbortController()
  try {
    return await use({ client, endpoint: mesh, isEmbedded: false, signal, hurry: () => {} })
  } catch (error) {
    throw await causeOf(error, context)
  } finally {
    client.close()
  }
}

/** The one of the state folder is on this machine; a named one may be anywhere. */
export function connectTo({ server, tlsRoots }: Context, endpoint: Endpoint): TunemeshClient {
  const { grpc: address, token } = endpoint
  return connect({ address, token, tlsRoots: server === undefined ? undefined : tlsRoots })
}

/** A named coordinator that hangs up on plain text may speak TLS. */
async function causeOf(error: unknown, { server, tlsRoots }: Context): Promise<unknown> {
  const isCutOff = error instanceof TunemeshError && error.code === 'COORDINATOR_UNREACHABLE'
  if (!isCutOff || server === undefined || tlsRoots !== undefined) return error
  if (!(await speaksTls(server))) return error
  return new TunemeshError(
    'TLS_REQUIRED',
    `${server} speaks TLS only. Give --ca with the file tls/ca.pem of its state folder.`,
    { cause: error },
  )
}

/**
 * A coordinator that another command starts or ends at this moment has the folder, yet no endpoint
 * that answers: soon it has one, or has left the folder to us.
 */
async function startOrFind(
  context: Context,
  needs: MeshNeeds,
): Promise<Endpoint | EmbeddedCoordinator> {
  const giveUpMs = performance.now() + otherSettlesMs
  for (;;) {
    try {
      return await startInterruptibly(context, needs)
    } catch (error) {
      const isInUse = error instanceof TunemeshError && error.code === 'STATE_IN_USE'
      if (!isInUse || performance.now() >= giveUpMs) throw error
    }
    await delay(lookAgainMs)
    const found = await findUsable(context, needs)
    if (found !== null) return found
  }
}

/**
 * A coordinator that runs no jobs, because another command only looks at the state folder, goes
 * soon: waits for that, as long as it can not do what is needed. One that stays is returned, and
 * says itself why it can not.
 */
async function findUsable(context: Context, needs: MeshNeeds): Promise<Endpoint | null> {
  let found = await findEndpoint(context)
  if (found === null || canServe(found, needs)) return found
  const seconds = lookerEndsMs / 1000
  context.output.note(
    `Another command looks at ${context.stateDir} (process ${found.pid}); ` +
      `waiting up to ${seconds} s for it to end.`,
  )
  const leave = new AbortController()
  const restore = context.interrupts.handle(() => leave.abort())
  const giveUpMs = performance.now() + lookerEndsMs
  try {
    while (found !== null && !canServe(found, needs) && performance.now() < giveUpMs) {
      await delay(lookAgainMs, undefined, { signal: leave.signal })
      found = await findEndpoint(context)
    }
    return found
  } catch (error) {
    if (!leave.signal.aborted) throw error
    throw new TunemeshError('JOB_STOPPED', 'Interrupted while waiting for the state folder.')
  } finally {
    restore()
  }
}

/** `jobs` and `logs` start no workers, and without one nothing is planned or answered. */
const canServe = (found: Endpoint, needs: MeshNeeds): boolean =>
  !found.isHeld || (needs.isHeld === true && found.numWorkers >= Math.min(1, needs.numWorkers))

export async function findEndpoint(context: Context): Promise<Endpoint | null> {
  if (context.server !== undefined) return namedEndpoint(context.server, context.token)
  return liveEndpoint(context.stateDir)
}

async function useEmbedded<T>(
  parts: { context: Context; needs: MeshNeeds; embedded: EmbeddedCoordinator },
  use: (mesh: Mesh) => Promise<T>,
): Promise<T> {
  const { context, needs, embedded } = parts
  const { endpoint } = embedded
  const gone = new AbortController()
  let isClosing = false
  let graceMs: number | undefined
  void embedded.ended.then(() => {
    if (!isClosing) gone.abort(endedAlone(embedded.logPath))
  })
  const client = connect({ address: endpoint.grpc, token: endpoint.token })
  const hurry = () => {
    graceMs = hurriedGraceMs
  }
  try {
    return await use({ client, endpoint, isEmbedded: true, signal: gone.signal, hurry })
  } finally {
    const isWanted = !needs.isHeld && graceMs === undefined && !gone.signal.aborted
    if (isWanted) await waitForQueued(context, client, gone.signal)
    isClosing = true
    client.close()
    await closeInterruptibly(context, embedded, graceMs)
  }
}

/** Jobs that other commands have queued here would end with this mesh; it stays for them. */
async function waitForQueued(
  { output, interrupts }: Context,
  client: TunemeshClient,
  gone: AbortSignal,
): Promise<void> {
  const leave = new AbortController()
  const restore = interrupts.handle(() => leave.abort())
  const signal = AbortSignal.any([leave.signal, gone])
  try {
    for (let isTold = false; !signal.aborted; isTold = true) {
      const waiting = (await client.list(maxListed)).filter((job) => !hasEnded(job))
      const oldest = waiting.at(-1)
      if (oldest === undefined) return
      const ids = waiting.map((job) => job.jobId).join(', ')
      if (!isTold) output.note(`This mesh stays until ${ids} ended. Ctrl-C stops what is left.`)
      for await (const _event of client.watch(oldest.jobId, { signal }));
    }
  } catch (error) {
    if (!signal.aborted) output.note(`The queue could not be read: ${(error as Error).message}`)
  } finally {
    restore()
  }
}

/** Nothing more happens to the job by itself. */
export const hasEnded = ({ state }: { state: string }) =>
  state === 'SUCCEEDED' || state === 'FAILED' || state === 'STOPPED'

async function startInterruptibly(
  context: Context,
  needs: MeshNeeds,
): Promise<EmbeddedCoordinator> {
  const cancel = new AbortController()
  const restore = context.interrupts.handle(() => cancel.abort())
  try {
    return await startEmbedded({
      stateDir: context.stateDir,
      numWorkers: needs.numWorkers,
      threadsPerWorker: needs.threadsPerWorker || threadsFor(needs.numWorkers),
      device: needs.device,
      dashboardPort: needs.hasDashboard ? 0 : null,
      isHeld: needs.isHeld ?? false,
      natsServerPath: context.natsServerPath,
      signal: cancel.signal,
    })
  } finally {
    restore()
  }
}

/** Ending takes a moment; an interrupt in it shortens it, and never leaves a process behind. */
async function closeInterruptibly(
  context: Context,
  embedded: EmbeddedCoordinator,
  graceMs: number | undefined,
): Promise<void> {
  const restore = context.interrupts.handle(() => void embedded.close(hurriedGraceMs))
  try {
    await embedded.close(graceMs)
  } finally {
    restore()
  }
}

const threadsFor = (numWorkers: number) =>
  Math.max(1, Math.floor(availableParallelism() / Math.max(1, numWorkers)))

const endedAlone = (logPath: string) =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `The embedded coordinator ended by itself; ${logPath} says why. ` +
      'What was committed is kept: go on with `tunemesh resume JOB`.',
  )
