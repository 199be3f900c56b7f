/** `tunemesh fleet`: hosts, workers and devices of the mesh that runs; with --watch as they change. */
import { setTimeout as delay } from 'node:timers/promises'
import { connect } from '../client/client.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { findEndpoint } from './mesh.js'
import { renderFleet } from './render-fleet.js'

export interface FleetOptions {
  watch: boolean
  interval: number
}

export async function fleet(context: Context, options: FleetOptions): Promise<void> {
  const endpoint = await findEndpoint(context)
  if (endpoint === null) {
    throw new TunemeshError(
      'COORDINATOR_UNREACHABLE',
      `No coordinator runs on ${context.stateDir}, so there is no fleet. Start one: tunemesh up.`,
    )
  }
  const { output } = context
  const client = connect({ address: endpoint.grpc, token: endpoint.token })
  const leave = new AbortController()
  const restore = context.interrupts.handle(() => leave.abort())
  try {
    for (let numDrawn = 0; !leave.signal.aborted; ) {
      const workers = await client.listWorkers({ withGone: true })
      output.record('fleet', { timeMs: Date.now(), workers })
      numDrawn = output.redraw(renderFleet(workers), numDrawn)
      if (!options.watch) return
      await delay(options.interval * 1_000, undefined, { signal: leave.signal }).catch(() => {})
    }
  } finally {
    restore()
    client.close()
  }
}
