/**
 * Receives published sums into the two sum slots, from an owner's fan-out or from a worker that was
 * asked. It outlives fleet epochs: a committed sum stays what it is, known by its digest.
 */
import type { CreditOf, FrameHeader } from '../proto/frame.js'
import { checkedHeader, plausibleHeader } from './data-plane-frames.js'
import type { EpochScope } from './data-plane-link.js'
import { fanOutBytes } from './data-plane-publisher.js'
import type { SliceKey, WorkerEffect } from './run-events.js'

type RequestSum = Extract<WorkerEffect, { kind: 'requestSum' }>

/** One step's slice of the published gradient, whole or on its way. */
interface HeldSum {
  step: number
  slice: number
  fleetEpoch: number
  sliceAttempt: number
  storing: Set<number>
  stored: Set<number>
  /** Digest of what stands in the slot; null: not whole. */
  digest: string | null
  /** This worker has asked for it: a direct answer is taken whatever attempt it is of. */
  isRequested: boolean
}

interface Acknowledgement {
  header: FrameHeader
  chunks: number[]
  bytes: number
}

export class DataPlaneReceiver {
  readonly #sums = new Map<string, HeldSum>()
  readonly #acknowledgements = new Map<string, Acknowledgement>()
  #accepted = new Set<number>()
  #scope: EpochScope | null = null

  /** @param onSlotReused a step's slice is about to be written where an older step's stood */
  constructor(private readonly onSlotReused: (step: number, slice: number) => void) {}

  openEpoch(scope: EpochScope | null): void {
    this.#scope = scope
    this.#acknowledgements.clear()
    for (const [name, sum] of [...this.#sums]) if (sum.digest === null) this.#sums.delete(name)
  }

  accept(steps: readonly number[]): void {
    this.#accepted = new Set(steps)
  }

  /** This worker's own sum goes into the slot. */
  holdOwn(key: SliceKey): void {
    this.#begin(key)
  }

  ownIsWhole(key: SliceKey, digest: string): void {
    const sum = this.#sums.get(nameOf(key))
    if (sum && isSame(sum, key)) sum.digest = digest
  }

  /** The attempt a held sum is of; null: not whole here. */
  heldAttempt(step: number, slice: number): number | null {
    const sum = this.#sums.get(nameOf({ step, slice }))
    return sum && sum.digest !== null ? sum.sliceAttempt : null
  }

  request({ step, slice, fromWorkerId, digest }: RequestSum): void {
    const scope = this.#scope
    if (scope === null) return
    const held = this.#sums.get(nameOf({ step, slice }))
    if (held?.digest === digest) return scope.emit({ kind: 'sumArrived', step, slice, digest })
    if (held === undefined || held.digest !== null) {
      this.#begin({ fleetEpoch: -1, step, slice, sliceAttempt: -1 }).isRequested = true
    } else {
      held.isRequested = true
    }
    scope.link.credit({ workerId: fromWorkerId }, { kind: 'wantSum', step, slice, digest })
  }

  refused({ step, slice, from }: CreditOf<'noSum'>): void {
    this.#scope?.emit({ kind: 'sumUnavailable', step, slice, fromWorkerId: from })
  }

  /** @param isDirect sent to this worker alone, because it asked */
  onFrame(frame: Uint8Array, reply: string | undefined, isDirect: boolean): void {
    const scope = this.#scope
    if (scope === null) return
    scope.counts.framesReceived++
    scope.counts.bytesReceived += frame.byteLength
    const header = checkedHeader(scope, frame, 'sum')
    if (header === null) return this.#askAgain(frame, reply)
    const sum = this.#accepted.has(header.step) ? this.#adopt(header, isDirect) : null
    if (sum === null || sum.storing.has(header.chunk)) {
      scope.counts.framesIgnored++
      return
    }
    if (sum.digest !== null || sum.stored.has(header.chunk)) {
      scope.counts.framesIgnored++
      return this.#acknowledge(header, reply, frame.byteLength)
    }
    sum.storing.add(header.chunk)
    void this.#store(sum, header, frame, reply).catch((error: unknown) =>
      scope.fail('storeSum', header.step, error),
    )
  }

  /** Acknowledgements wait for a quarter of the fan-out's window, but no longer than a tick. */
  tick(): void {
    for (const reply of [...this.#acknowledgements.keys()]) this.#sendAcknowledgement(reply)
  }

  async #store(
    sum: HeldSum,
    header: FrameHeader,
    frame: Uint8Array,
    reply: string | undefined,
  ): Promise<void> {
    const scope = this.#scope
    if (scope === null) return
    await scope.exchange.storePublishedFrames([frame])
    if (this.#sums.get(nameOf(sum)) !== sum) return
    sum.storing.delete(header.chunk)
    sum.stored.add(header.chunk)
    this.#acknowledge(header, reply, frame.byteLength)
    if (sum.stored.size < header.numChunks) return
    if (reply !== undefined) this.#sendAcknowledgement(reply)
    const digest = await scope.exchange.publishedDigest(sum.step, sum.slice)
    if (this.#sums.get(nameOf(sum)) !== sum) return
    sum.digest = digest
    sum.isRequested = false
    scope.emit({ kind: 'sumArrived', step: sum.step, slice: sum.slice, digest })
  }

  /** The sum that a frame belongs to; null: the frame is of an older attempt. */
  #adopt(header: FrameHeader, isDirect: boolean): HeldSum | null {
    const held = this.#sums.get(nameOf(header))
    if (held === undefined) return this.#begin(header)
    if (isSame(held, header)) return held
    // A late second answer to a request that has been answered.
    if (isDirect && held.digest !== null && !held.isRequested) return held
    const isNewer =
      header.fleetEpoch > held.fleetEpoch ||
      (header.fleetEpoch === held.fleetEpoch && header.sliceAttempt > held.sliceAttempt)
    if (!isNewer && !(isDirect && held.isRequested)) return null
    if (held.digest !== null) {
      this.#scope?.emit({ kind: 'sumOverwritten', step: held.step, slice: held.slice })
    }
    const sum = this.#begin(header)
    sum.isRequested = held.isRequested
    return sum
  }

  #begin({ step, slice, fleetEpoch, sliceAttempt }: SliceKey): HeldSum {
    for (const [name, sum] of [...this.#sums]) {
      if (sum.slice !== slice || (sum.step - step) % 2 !== 0) continue
      this.#sums.delete(name)
    }
    this.onSlotReused(step, slice)
    const sum: HeldSum = {
      ...{ step, slice, fleetEpoch, sliceAttempt },
      storing: new Set(),
      stored: new Set(),
      digest: null,
      isRequested: false,
    }
    this.#sums.set(nameOf(sum), sum)
    return sum
  }

  #acknowledge(header: FrameHeader, reply: string | undefined, bytes: number): void {
    if (reply === undefined || this.#scope === null) return
    const waiting = this.#acknowledgements.get(reply)
    if (waiting && !isSame(waiting.header, header)) this.#sendAcknowledgement(reply)
    const next = this.#acknowledgements.get(reply) ?? { header, chunks: [], bytes: 0 }
    next.chunks.push(header.chunk)
    next.bytes += bytes
    this.#acknowledgements.set(reply, next)
    if (next.bytes >= fanOutBytes(this.#scope.workerIds.length) / 4)
      this.#sendAcknowledgement(reply)
  }

  #sendAcknowledgement(reply: string): void {
    const waiting = this.#acknowledgements.get(reply)
    if (waiting === undefined) return
    this.#acknowledgements.delete(reply)
    const { step, slice, sliceAttempt } = waiting.header
    const key = { step, slice, sliceAttempt }
    this.#scope?.link.credit({ subject: reply }, { kind: 'stored', ...key, chunks: waiting.chunks })
  }

  #askAgain(frame: Uint8Array, reply: string | undefined): void {
    const damaged = plausibleHeader(frame)
    if (damaged === null || reply === undefined) return
    const { step, slice, sliceAttempt, chunk } = damaged
    const key = { step, slice, sliceAttempt }
    this.#scope?.link.credit({ subject: reply }, { kind: 'needSum', ...key, chunks: [chunk] })
  }
}

const nameOf = (key: { step: number; slice: number }) => `${key.step}/${key.slice}`

const isSame = (a: SliceKey, b: SliceKey) =>
  a.step === b.step &&
  a.slice === b.slice &&
  a.fleetEpoch === b.fleetEpoch &&
  a.sliceAttempt === b.sliceAttempt
