/**
 * `tunemesh up`: a coordinator that stays, on fixed ports, for workers and clients to come and go.
 */
import { startEmbedded } from '../client/embedded.js'
import { liveEndpoint } from '../client/endpoint.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { labelled } from './style.js'
import { showJoinLine } from './token.js'

export interface UpOptions {
  workers: number
  threads?: number | undefined
  device?: string | undefined
  grpcPort: number
  dashboardPort: number
  dashboard: boolean
  listen?: string | undefined
  /** Seconds. */
  tokenTtl: number
}

export async function up(context: Context, options: UpOptions): Promise<void> {
  const { output, stateDir } = context
  const live = await liveEndpoint(stateDir)
  if (live !== null) {
    throw new TunemeshError(
      'STATE_IN_USE',
      `A coordinator runs on ${stateDir} already, at ${live.grpc} (process ${live.pid}). ` +
        'Use it, stop it, or give another --state-dir.',
    )
  }
  const cancel = new AbortController()
  const restoreStart = context.interrupts.handle(() => cancel.abort())
  const embedded = await startEmbedded({
    stateDir,
    numWorkers: options.workers,
    threadsPerWorker: options.threads ?? 0,
    device: options.device,
    grpcPort: options.grpcPort,
    listen: options.listen,
    tokenTtlSeconds: options.tokenTtl,
    dashboardPort: options.dashboard ? options.dashboardPort : null,
    natsServerPath: context.natsServerPath,
    signal: cancel.signal,
  }).finally(restoreStart)

  const { grpc, dashboard } = embedded.endpoint
  const { join } = embedded
  const style = output.style
  output.record('mesh', { grpc, dashboard, stateDir, workers: options.workers, join })
  if (dashboard) output.line(labelled(style, 'Dashboard', style.accent(dashboard)))
  output.line(labelled(style, 'gRPC', grpc))
  output.line(labelled(style, 'Log', embedded.logPath))
  output.line(labelled(style, 'Here', `tunemesh worker --state-dir ${stateDir}`))
  if (join !== null) showJoinLine(output, join, 1)
  output.note(
    'Ctrl-C ends it: a job that runs is stopped with a checkpoint, for `tunemesh resume`.',
  )

  let isWanted = true
  const restore = context.interrupts.handle((count) => {
    isWanted = false
    if (count === 1) output.note('Stopping…')
    void embedded.close(count === 1 ? undefined : 1_000)
  })
  await embedded.ended
  restore()
  if (isWanted) {
    throw new TunemeshError(
      'COORDINATOR_UNREACHABLE',
      `The coordinator ended by itself; ${embedded.logPath} says why. Start it again.`,
    )
  }
}
