/**
 * The owner's side: grants offers within 16 MiB, stages the chunks of each attempt apart, and adds
 * a contribution only when the run machine counts it. What is staged is never mixed between
 * attempts, and a lease that has counted is not taken again.
 */
import { TunemeshError } from '../proto/errors.js'
import { type CreditOf, digestText, type FrameHeader } from '../proto/frame.js'
import { contributionSubject } from '../proto/subjects.js'
import { checkedHeader, plausibleHeader } from './data-plane-frames.js'
import type { EpochScope } from './data-plane-link.js'
import { isPoisoned } from './exchange-buffers.js'
import type { SliceKey, WorkerEffect } from './run-events.js'

type Effect<Kind extends WorkerEffect['kind']> = Extract<WorkerEffect, { kind: Kind }>
type Offer = CreditOf<'offer'>

/** Most bytes of contributions granted and not yet added, except that one is always allowed. */
const stagedBytesLimit = 16 << 20
/** Offers that wait for their slice to open; a contributor repeats what is pushed out. */
const maxWaitingOffers = 1024
const firstNeedMs = 1_000
const maxNeeds = 4

/** One attempt of a lease's slice on its way in. */
interface Arrival {
  offer: Offer
  chunks: (Uint8Array | undefined)[]
  numArrived: number
  digest: bigint
  isGranted: boolean
  isComplete: boolean
  lastMs: number
  numNeeds: number
}

interface OwnedSlice {
  key: SliceKey
  unsubscribe: (() => void) | null
  /** By lease and attempt. */
  arrivals: Map<string, Arrival>
  /** Attempts that arrived whole, counted or dropped since. */
  delivered: Set<string>
  counted: Set<number>
  /** Of everything added, from the frames' headers: the finished sum must have it. */
  digest: bigint
  /** Something that was counted could not be added: such a sum is never finished. */
  isBroken: boolean
}

export class DataPlaneOwner {
  readonly #slices = new Map<number, OwnedSlice>()
  readonly #waiting = new Map<string, Offer>()
  #stagedBytes = 0

  /** @param scope without a link while this worker is alone */
  constructor(
    private readonly scope: Omit<EpochScope, 'link'> & { link: EpochScope['link'] | null },
  ) {}

  open({ kind: _, ...key }: Effect<'openSlice'>): void {
    const existing = this.#slices.get(key.slice)
    if (existing && isSame(existing.key, key)) return
    if (existing) this.#drop(existing)
    const { jobId, workerId, exchange, link } = this.scope
    const subject = contributionSubject({ job: jobId, ownerWorkerId: workerId, ...key })
    const slice: OwnedSlice = {
      key,
      unsubscribe:
        link?.subscribe(subject, ({ data, reply }) => this.#onFrame(data, reply)) ?? null,
      arrivals: new Map(),
      delivered: new Set(),
      counted: new Set(),
      digest: 0n,
      isBroken: false,
    }
    this.#slices.set(key.slice, slice)
    exchange.clearSum(key.slice).catch((error) => this.scope.fail('openSlice', key.step, error))
    for (const [name, offer] of [...this.#waiting]) {
      if (offer.slice !== key.slice) continue
      this.#waiting.delete(name)
      this.offered(offer)
    }
  }

  closeSlice(effect: Effect<'closeSlice'>): void {
    const slice = this.#find(effect)
    if (slice === null) return
    this.#slices.delete(effect.slice)
    this.#drop(slice)
    this.#grant()
  }

  offered(offer: Offer): void {
    const slice = this.#find(offer)
    if (slice === null) return this.#wait(offer)
    const name = attemptOf(offer)
    if (slice.counted.has(offer.lease) || slice.delivered.has(name)) {
      return this.#answer(offer, 'delivered')
    }
    const arrival = slice.arrivals.get(name)
    if (arrival === undefined) {
      // Another cut of the vector cannot be assembled: it is another job's or another version's.
      if (offer.numChunks !== this.scope.exchange.numChunks(offer.slice)) return
      slice.arrivals.set(name, newArrival(offer, this.scope.nowMs()))
      this.#grant()
    } else if (arrival.isGranted) {
      this.#need(arrival)
    }
  }

  count(effect: Effect<'countContribution'>): void {
    const slice = this.#find(effect)
    if (slice === null) return
    slice.counted.add(effect.lease)
    void this.#add(slice, effect).catch((error: unknown) => {
      slice.isBroken = true
      if (!isPoisoned(error)) this.scope.fail('countContribution', effect.step, error)
    })
  }

  dropContribution(effect: Effect<'dropContribution'>): void {
    const slice = this.#find(effect)
    const arrival = slice?.arrivals.get(attemptOf(effect))
    if (slice && arrival) this.#release(slice, arrival)
    this.#grant()
  }

  /**
   * Rounds the sum into the published slot; `onWhole` hears its digest before the run machine does.
   */
  async finish(effect: Effect<'finishSlice'>, onWhole: (digest: string) => void): Promise<void> {
    const slice = this.#find(effect)
    if (slice === null) return
    const finished = await this.scope.exchange.finishSlice(effect.step, effect.slice)
    if (slice.isBroken) return
    const expected = digestText(slice.digest)
    if (finished.sumDigest !== expected) {
      throw new TunemeshError(
        'DIGEST_MISMATCH',
        `The sum of slice ${effect.slice} of step ${effect.step} has digest ` +
          `${finished.sumDigest}; its contributions add up to ${expected}. ` +
          "The machine's memory may be faulty.",
      )
    }
    onWhole(finished.publishedDigest)
    const { kind: _, ...key } = effect
    this.scope.emit({ kind: 'sliceFinished', ...key, ...finished })
  }

  /** Asks again for what a granted contribution still lacks; gives up on silent contributors. */
  tick(): void {
    for (const slice of this.#slices.values()) {
      for (const arrival of [...slice.arrivals.values()]) {
        if (!arrival.isGranted || arrival.isComplete) continue
        const patienceMs = firstNeedMs * 2 ** arrival.numNeeds
        if (this.scope.nowMs() - arrival.lastMs < patienceMs) continue
        if (arrival.numNeeds++ < maxNeeds) this.#need(arrival)
        else this.#release(slice, arrival)
      }
    }
    this.#grant()
  }

  connectionReturned(): void {
    for (const slice of this.#slices.values()) {
      for (const arrival of slice.arrivals.values()) {
        if (arrival.isGranted && !arrival.isComplete) this.#need(arrival)
      }
    }
  }

  close(): void {
    for (const slice of this.#slices.values()) this.#drop(slice)
    this.#slices.clear()
    this.#waiting.clear()
  }

  async #add(slice: OwnedSlice, effect: Effect<'countContribution'>): Promise<void> {
    const { exchange } = this.scope
    if (effect.slot !== null) {
      const digest = await exchange.addOwnContribution(effect.slot, effect.slice)
      slice.digest += BigInt(`0x${digest}`)
      return
    }
    const arrival = slice.arrivals.get(attemptOf(effect))
    if (!arrival?.isComplete) {
      throw new TunemeshError(
        'INTERNAL',
        `Lease ${effect.lease} attempt ${effect.leaseAttempt} of slice ${effect.slice} ` +
          'was counted before it had arrived.',
      )
    }
    try {
      const digest = await exchange.addContributionFrames(arrival.chunks as Uint8Array[])
      slice.digest += BigInt(`0x${digest}`)
    } finally {
      this.#release(slice, arrival)
      this.#grant()
    }
  }

  #onFrame(frame: Uint8Array, reply: string | undefined): void {
    const { counts } = this.scope
    counts.framesReceived++
    counts.bytesReceived += frame.byteLength
    const header = this.#check(frame, reply)
    if (header === null) return
    const slice = this.#find(header)
    const arrival = slice?.arrivals.get(attemptOf(header))
    if (!slice || !arrival?.isGranted || arrival.chunks[header.chunk] !== undefined) {
      counts.framesIgnored++
      return
    }
    arrival.chunks[header.chunk] = frame
    arrival.numArrived++
    arrival.digest += header.digest
    arrival.lastMs = this.scope.nowMs()
    if (arrival.numArrived === arrival.chunks.length) this.#completed(slice, arrival)
  }

  #completed(slice: OwnedSlice, arrival: Arrival): void {
    const { offer } = arrival
    arrival.isComplete = true
    slice.delivered.add(attemptOf(offer))
    this.#answer(offer, 'delivered')
    this.scope.emit({
      kind: 'contributionArrived',
      ...slice.key,
      lease: offer.lease,
      leaseAttempt: offer.leaseAttempt,
      digest: digestText(arrival.digest),
    })
  }

  /** null: refused and asked for again, or of no interest. */
  #check(frame: Uint8Array, reply: string | undefined): FrameHeader | null {
    const header = checkedHeader(this.scope, frame, 'contribution')
    if (header !== null) return header
    const damaged = plausibleHeader(frame)
    if (damaged !== null && reply !== undefined) {
      const { step, slice, sliceAttempt, lease, leaseAttempt, chunk } = damaged
      const key = { step, slice, sliceAttempt, lease, leaseAttempt }
      this.scope.link?.credit({ subject: reply }, { kind: 'need', ...key, chunks: [chunk] })
    }
    return null
  }

  /** Oldest first, so that no contributor waits for ever. */
  #grant(): void {
    const { counts, nowMs } = this.scope
    for (const slice of this.#slices.values()) {
      for (const arrival of slice.arrivals.values()) {
        if (arrival.isGranted) continue
        const { bytes } = arrival.offer
        if (this.#stagedBytes > 0 && this.#stagedBytes + bytes > stagedBytesLimit) return
        arrival.isGranted = true
        arrival.lastMs = nowMs()
        this.#stagedBytes += bytes
        counts.peakStagedBytes = Math.max(counts.peakStagedBytes, this.#stagedBytes)
        this.#answer(arrival.offer, 'grant')
      }
    }
  }

  #answer(offer: Offer, kind: 'grant' | 'delivered'): void {
    const { from, step, slice, sliceAttempt, lease, leaseAttempt } = offer
    const key = { step, slice, sliceAttempt, lease, leaseAttempt }
    this.scope.link?.credit({ workerId: from }, { kind, ...key })
  }

  #need({ offer, chunks }: Arrival): void {
    const { from, step, slice, sliceAttempt, lease, leaseAttempt } = offer
    const missing = [...chunks.keys()].filter((chunk) => chunks[chunk] === undefined)
    if (missing.length === 0) return
    const key = { step, slice, sliceAttempt, lease, leaseAttempt }
    this.scope.link?.credit({ workerId: from }, { kind: 'need', ...key, chunks: missing })
  }

  #wait(offer: Offer): void {
    const current = this.#slices.get(offer.slice)?.key
    if (current && current.step === offer.step && current.sliceAttempt > offer.sliceAttempt) return
    const name = `${offer.slice}/${offer.sliceAttempt}/${offer.step}/${attemptOf(offer)}`
    this.#waiting.delete(name)
    this.#waiting.set(name, offer)
    const [oldest] = this.#waiting.keys()
    if (this.#waiting.size > maxWaitingOffers && oldest !== undefined) this.#waiting.delete(oldest)
  }

  #release(slice: OwnedSlice, arrival: Arrival): void {
    if (!slice.arrivals.delete(attemptOf(arrival.offer))) return
    if (arrival.isGranted) this.#stagedBytes -= arrival.offer.bytes
  }

  #drop(slice: OwnedSlice): void {
    slice.unsubscribe?.()
    for (const arrival of [...slice.arrivals.values()]) this.#release(slice, arrival)
  }

  #find(key: Omit<SliceKey, 'fleetEpoch'>): OwnedSlice | null {
    const slice = this.#slices.get(key.slice)
    if (slice === undefined || slice.key.step !== key.step) return null
    return slice.key.sliceAttempt === key.sliceAttempt ? slice : null
  }
}

interface AttemptKey {
  lease: number
  leaseAttempt: number
}
const attemptOf = (key: AttemptKey) => `${key.lease}/${key.leaseAttempt}`

const isSame = (a: SliceKey, b: SliceKey) => a.step === b.step && a.sliceAttempt === b.sliceAttempt

const newArrival = (offer: Offer, nowMs: number): Arrival => ({
  offer,
  chunks: Array.from({ length: offer.numChunks }, () => undefined),
  numArrived: 0,
  digest: 0n,
  isGranted: false,
  isComplete: false,
  lastMs: nowMs,
  numNeeds: 0,
})
