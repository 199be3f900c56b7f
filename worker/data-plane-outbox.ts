/**
 * The contributor's side: each slice of a contribution is offered to its owner as soon as it
 * stands, while backward goes on with the others; sent when granted, and offered again until the
 * owner says that all of it has arrived. Offers are small and idempotent, so one timer heals every
 * loss.
 */

import { failpoint } from '../proto/failpoint.js'
import type { CreditOf } from '../proto/frame.js'
import { contributionSubject } from '../proto/subjects.js'
import type { EpochScope, Shipment } from './data-plane-link.js'
import { isPoisoned } from './exchange-buffers.js'
import type { WorkerEffect } from './run-events.js'

type SendContribution = Extract<WorkerEffect, { kind: 'sendContribution' }>
type CancelContribution = Extract<WorkerEffect, { kind: 'cancelContribution' }>

const firstRetryMs = 500
const longestRetryMs = 2_000

class OutgoingSlice implements Shipment {
  readonly subject: string
  readonly pending: number[] = []
  isCancelled = false
  lastMs: number
  retryMs = firstRetryMs

  constructor(
    private readonly scope: EpochScope,
    readonly effect: SendContribution,
  ) {
    this.subject = contributionSubject({ job: scope.jobId, ...effect })
    this.lastMs = scope.nowMs()
  }

  /** The grant covers the whole slice. */
  room(): number {
    return this.pending.length
  }

  pack(chunks: readonly number[], frames: readonly number[]): Promise<number[]> {
    failpoint('worker.before-contribution')
    const { slot, step, slice, sliceAttempt, lease, leaseAttempt } = this.effect
    const { jobHash, fleetEpoch } = this.scope
    const header = { jobHash, fleetEpoch, step, slice, sliceAttempt, lease, leaseAttempt }
    return this.scope.exchange.packContribution(slot, { header, chunks, frames })
  }

  sent(): void {
    this.lastMs = this.scope.nowMs()
  }

  failed(error: unknown): void {
    if (!isPoisoned(error)) this.scope.fail('sendContribution', this.effect.step, error)
  }

  offer(): void {
    const { slot, step, slice, sliceAttempt, lease, leaseAttempt, ownerWorkerId } = this.effect
    this.lastMs = this.scope.nowMs()
    this.scope.link.credit(
      { workerId: ownerWorkerId },
      {
        kind: 'offer',
        step,
        slice,
        sliceAttempt,
        lease,
        leaseAttempt,
        numChunks: this.scope.exchange.numChunks(slice),
        bytes: this.scope.exchange.packedBytes(slot, slice),
      },
    )
  }
}

export class DataPlaneOutbox {
  readonly #outgoing = new Map<string, OutgoingSlice>()

  constructor(private readonly scope: EpochScope) {}

  send(effect: SendContribution): void {
    const key = keyOf(effect)
    if (this.#outgoing.has(key)) return
    const outgoing = new OutgoingSlice(this.scope, effect)
    this.#outgoing.set(key, outgoing)
    outgoing.offer()
  }

  cancel(effect: CancelContribution): void {
    for (const [key, outgoing] of this.#outgoing) {
      const { step, lease, leaseAttempt } = outgoing.effect
      if (step !== effect.step || lease !== effect.lease) continue
      if (leaseAttempt !== effect.leaseAttempt) continue
      outgoing.isCancelled = true
      this.#outgoing.delete(key)
    }
  }

  receive(message: CreditOf<'grant' | 'need' | 'delivered'>): void {
    const outgoing = this.#outgoing.get(keyOf(message))
    if (outgoing === undefined) return
    const { kind: _, slot: __, ownerWorkerId: ___, digest: ____, ...key } = outgoing.effect
    if (message.kind === 'delivered') {
      outgoing.isCancelled = true
      this.#outgoing.delete(keyOf(message))
      this.scope.emit({ kind: 'contributionDelivered', ...key })
      return
    }
    const numChunks = this.scope.exchange.numChunks(key.slice)
    const wanted =
      message.kind === 'need' ? message.chunks : Array.from({ length: numChunks }, (_, i) => i)
    for (const chunk of wanted) {
      if (chunk < numChunks && !outgoing.pending.includes(chunk)) outgoing.pending.push(chunk)
    }
    outgoing.retryMs = firstRetryMs
    outgoing.lastMs = this.scope.nowMs()
    this.scope.link.ship(outgoing)
  }

  tick(): void {
    for (const outgoing of this.#outgoing.values()) {
      if (outgoing.pending.length > 0) continue
      if (this.scope.nowMs() - outgoing.lastMs < outgoing.retryMs) continue
      outgoing.retryMs = Math.min(2 * outgoing.retryMs, longestRetryMs)
      outgoing.offer()
    }
  }

  connectionReturned(): void {
    for (const outgoing of this.#outgoing.values()) outgoing.offer()
  }

  close(): void {
    for (const outgoing of this.#outgoing.values()) outgoing.isCancelled = true
    this.#outgoing.clear()
  }
}

interface OutgoingKey {
  step: number
  slice: number
  sliceAttempt: number
  lease: number
  leaseAttempt: number
}
const keyOf = (k: OutgoingKey) =>
  `${k.step}/${k.slice}/${k.sliceAttempt}/${k.lease}/${k.leaseAttempt}`
