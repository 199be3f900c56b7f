/**
 * The coordinator a verb talks to: the named one, the live one, or one of its own for as long as it
 * runs.
 */
import { availableParallelism } from 'node:os'
import { connect, type TunemeshClient } from '../client/client.js'
import { type EmbeddedCoordinator, startEmbedded } from '../client/embedded.js'
import { type Endpoint, liveEndpoint, namedEndpoint } from '../client/endpoint.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'

export interface MeshNeeds {
  /** Workers of an embedded mesh; a live coordinator has its own. */
  numWorkers: number
  /** 0: the processors divided among the workers. */
  threadsPerWorker?: number
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

export async function withMesh<T>(
  context: Context,
  needs: MeshNeeds,
  use: (mesh: Mesh) => Promise<T>,
): Promise<T> {
  const found = await findEndpoint(context)
  if (found === null) return withEmbedded(context, needs, use)
  const client = connect({ address: found.grpc, token: found.token })
  const { signal } = new AbortController()
  try {
    return await use({ client, endpoint: found, isEmbedded: false, signal, hurry: () => {} })
  } finally {
    client.close()
  }
}

export async function findEndpoint(context: Context): Promise<Endpoint | null> {
  if (context.server !== undefined) return namedEndpoint(context.server, context.token)
  return liveEndpoint(context.stateDir)
}

async function withEmbedded<T>(
  context: Context,
  needs: MeshNeeds,
  use: (mesh: Mesh) => Promise<T>,
): Promise<T> {
  const embedded = await startInterruptibly(context, needs)
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
    isClosing = true
    client.close()
    await closeInterruptibly(context, embedded, graceMs)
  }
}

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
