/** `tunemesh fleet`: hosts, workers and devices of the mesh that runs; --watch: as they change. */
import { setTimeout as delay } from 'node:timers/promises'
import type { TunemeshClient } from '../client/client.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { escapeLine } from './escape.js'
import { withLiveMesh } from './mesh.js'
import { renderFleet } from './render-fleet.js'

export interface FleetOptions {
  watch: boolean
  interval: number
  /** Names or identities of hosts to put out. */
  revoke: string[]
}

export async function fleet(context: Context, options: FleetOptions): Promise<void> {
  const shown = await withLiveMesh(context, async ({ client }) => {
    if (options.revoke.length === 0) await show(context, client, options)
    for (const host of options.revoke) await revoke(context, client, host)
    return true
  })
  if (shown) return
  throw new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `No coordinator runs on ${context.stateDir}, so there is no fleet. Start one: tunemesh up.`,
  )
}

async function revoke({ output }: Context, client: TunemeshClient, name: string): Promise<void> {
  const { hostId, host, numWorkers } = await client.revokeHost(name)
  output.record('revoked', { hostId, host, numWorkers })
  const workers = numWorkers === 1 ? '1 worker' : `${numWorkers} workers`
  output.line(`Revoked ${escapeLine(host) || 'a host'} (${hostId}), which had ${workers} attached.`)
  output.note('It is refused from now on. A new token lets it join again: tunemesh token.')
}

async function show(
  { output, interrupts }: Context,
  client: TunemeshClient,
  { watch, interval }: FleetOptions,
): Promise<void> {
  const leave = new AbortController()
  const restore = interrupts.handle(() => leave.abort())
  try {
    for (let numDrawn = 0; !leave.signal.aborted; ) {
      const workers = await client.listWorkers({ withGone: true })
      output.record('fleet', { timeMs: Date.now(), workers })
      numDrawn = output.redraw(renderFleet(workers), numDrawn)
      if (!watch) return
      await delay(interval * 1_000, undefined, { signal: leave.signal }).catch(() => {})
    }
  } finally {
    restore()
  }
}
