/**
 * Frames between simulated workers: two chunks a message, resent until acknowledged, staged by
 * attempt, sums in two slots by the parity of their step. What worker/data-plane.ts promises,
 * without bytes; like it, it has no link in an epoch of one worker, and hears of no other epoch.
 */
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { addWrapped, publishedDigest } from './toy-engine.js'

const numChunks = 2
const resendEveryMs = 40
const mostStaged = 64

export type Frame = { fleetEpoch: number } & Body

type Body =
  | {
      kind: 'contribution'
      step: number
      slice: number
      sliceAttempt: number
      lease: number
      leaseAttempt: number
      chunk: number
      value: bigint
      digest: string
      from: string
    }
  | { kind: 'ack'; to: string; name: string }
  | {
      kind: 'sum'
      step: number
      slice: number
      sliceAttempt: number
      chunk: number
      value: bigint
      /** Empty: everybody; else a worker that asked. */
      to: string
    }
  | { kind: 'sumRequest'; step: number; slice: number; digest: string; to: string; from: string }
  | { kind: 'sumRefusal'; step: number; slice: number; to: string; from: string }

type Contribution = Extract<Frame, { kind: 'contribution' }>
type Sum = Extract<Frame, { kind: 'sum' }>
type Effect<Kind extends WorkerEffect['kind']> = Extract<WorkerEffect, { kind: Kind }>
type Key = Pick<Contribution, 'fleetEpoch' | 'step' | 'slice' | 'sliceAttempt'>

interface OpenSlice {
  key: Key
  staged: Map<string, { chunks: Set<number>; frame: Contribution; hasArrived: boolean }>
  /** Attempts counted or dropped: acknowledged again when sent again. */
  settled: Set<string>
  accumulator: bigint
}

interface HeldSum extends Key {
  chunks: Set<number>
  value: bigint
  /** This worker has asked for it: a direct answer is taken whatever attempt it is of. */
  isRequested: boolean
}

export interface DataPlaneHost {
  workerId(): string
  publish(frame: Frame): void
  event(event: WorkerEvent): void
  after(delayMs: number, run: () => void): void
  contribution(slot: number, slice: number): bigint
}

export class ToyDataPlane {
  #fleetEpoch = 0
  #isLinked = false
  #accepted: number[] = []
  readonly #open = new Map<number, OpenSlice>()
  readonly #outgoing = new Map<string, Contribution>()
  readonly sums: Map<number, HeldSum>[] = [new Map(), new Map()]

  constructor(private readonly host: DataPlaneHost) {}

  get numStaged(): number {
    let staged = 0
    for (const open of this.#open.values()) staged += open.staged.size
    return staged
  }

  clear(): void {
    this.#open.clear()
    this.#outgoing.clear()
    this.#fleetEpoch = 0
    this.#isLinked = false
    this.#accepted = []
    for (const slot of this.sums) slot.clear()
  }

  openEpoch({ fleetEpoch, workerIds }: Effect<'openEpoch'>): void {
    this.#fleetEpoch = fleetEpoch
    this.#isLinked = workerIds.length > 1
    this.#open.clear()
    this.#outgoing.clear()
    for (const slot of this.sums) {
      for (const [slice, sum] of slot) if (!isWhole(sum)) slot.delete(slice)
    }
  }

  acceptSums(steps: number[]): void {
    this.#accepted = steps
  }

  openSlice(key: Key): void {
    this.#open.set(key.slice, {
      key: { ...key },
      staged: new Map(),
      settled: new Set(),
      accumulator: 0n,
    })
  }

  closeSlice(key: Key): void {
    if (this.#openOf(key)) this.#open.delete(key.slice)
  }

  sendContribution(effect: Effect<'sendContribution'>): void {
    if (!this.#isLinked) return
    const frame: Contribution = {
      kind: 'contribution',
      fleetEpoch: effect.fleetEpoch,
      step: effect.step,
      slice: effect.slice,
      sliceAttempt: effect.sliceAttempt,
      lease: effect.lease,
      leaseAttempt: effect.leaseAttempt,
      chunk: 0,
      value: this.host.contribution(effect.slot, effect.slice),
      digest: effect.digest,
      from: this.host.workerId(),
    }
    // One destination a slice: an older attempt of the slice is not sent any more.
    for (const [name, other] of this.#outgoing) {
      if (contributionName(other) === contributionName(frame) && other.slice === frame.slice) {
        this.#outgoing.delete(name)
      }
    }
    this.#outgoing.set(frameName(frame), frame)
    this.#resend(frame)
  }

  cancelContribution(effect: Effect<'cancelContribution'>): void {
    for (const [name, frame] of this.#outgoing) {
      if (contributionName(frame) === contributionName(effect)) this.#outgoing.delete(name)
    }
  }

  /** Adds a staged contribution, or one of the worker's own slots. */
  count(effect: Effect<'countContribution'>): void {
    const open = this.#openOf(effect)
    if (!open) return
    const name = contributionName(effect)
    if (effect.slot !== null) {
      open.accumulator = addWrapped(
        open.accumulator,
        this.host.contribution(effect.slot, effect.slice),
      )
      return
    }
    const staged = open.staged.get(name)
    if (!staged) throw new Error(`${name} is counted and not staged`)
    open.accumulator = addWrapped(open.accumulator, staged.frame.value)
    this.#settle(open, staged.frame)
  }

  drop(effect: Effect<'dropContribution'>): void {
    const open = this.#openOf(effect)
    const staged = open?.staged.get(contributionName(effect))
    if (open && staged) this.#settle(open, staged.frame)
  }

  accumulated(key: Key): bigint | null {
    return this.#openOf(key)?.accumulator ?? null
  }

  holdOwnSum(key: Key, value: bigint): void {
    this.#begin(key, value).chunks = new Set([0, 1])
  }

  publishSum({ step, slice, sliceAttempt }: Key): void {
    const held = this.#heldSum(step, slice)
    if (held) this.#sendSum({ step, slice, sliceAttempt, to: '' }, held.value)
  }

  requestSum({ step, slice, digest, fromWorkerId }: Effect<'requestSum'>): void {
    if (!this.#isLinked) return
    const held = this.#heldSum(step, slice)
    if (held && isWhole(held) && publishedDigest(held.value, slice) === digest) {
      return this.host.event({ kind: 'sumArrived', step, slice, digest })
    }
    const unknown = { fleetEpoch: -1, step, slice, sliceAttempt: -1 }
    const awaited = held && !isWhole(held) ? held : this.#begin(unknown, 0n)
    awaited.isRequested = true
    const from = this.host.workerId()
    this.#publish({ kind: 'sumRequest', step, slice, digest, to: fromWorkerId, from })
  }

  sendSum({ step, slice, toWorkerId }: Effect<'sendSum'>): void {
    const held = this.#heldSum(step, slice)
    if (!held || !isWhole(held)) return this.refuseSum({ step, slice, toWorkerId })
    const { sliceAttempt, value } = held
    this.#sendSum({ step, slice, sliceAttempt, to: toWorkerId }, value)
  }

  refuseSum({ step, slice, toWorkerId }: Omit<Effect<'refuseSum'>, 'kind'>): void {
    const from = this.host.workerId()
    this.#publish({ kind: 'sumRefusal', step, slice, to: toWorkerId, from })
  }

  #publish(body: Body): void {
    if (this.#isLinked) this.host.publish({ ...body, fleetEpoch: this.#fleetEpoch })
  }

  receive(frame: Frame): void {
    if (!this.#isLinked || frame.fleetEpoch !== this.#fleetEpoch) return
    if ('to' in frame && frame.to !== '' && frame.to !== this.host.workerId()) return
    switch (frame.kind) {
      case 'contribution':
        return this.#receiveContribution(frame)
      case 'ack':
        return this.#receiveAck(frame.name)
      case 'sum':
        return this.#receiveSum(frame)
      case 'sumRequest': {
        const { step, slice, digest, from } = frame
        return this.host.event({ kind: 'sumRequested', step, slice, digest, byWorkerId: from })
      }
      case 'sumRefusal': {
        const { step, slice, from } = frame
        return this.host.event({ kind: 'sumUnavailable', step, slice, fromWorkerId: from })
      }
    }
  }

  #receiveContribution(frame: Contribution): void {
    const open = this.#openOf(frame)
    if (!open) return
    const name = contributionName(frame)
    if (open.settled.has(name)) return this.#acknowledge(frame)
    const staged = open.staged.get(name) ?? {
      chunks: new Set<number>(),
      frame,
      hasArrived: false,
    }
    if (open.staged.size >= mostStaged) throw new Error('too many staged contributions')
    open.staged.set(name, staged)
    staged.chunks.add(frame.chunk)
    if (staged.chunks.size < numChunks || staged.hasArrived) return
    staged.hasArrived = true
    const { fleetEpoch, step, slice, sliceAttempt, lease, leaseAttempt, digest } = frame
    this.host.event({
      kind: 'contributionArrived',
      ...{ fleetEpoch, step, slice, sliceAttempt, lease, leaseAttempt, digest },
    })
  }

  #settle(open: OpenSlice, frame: Contribution): void {
    open.staged.delete(contributionName(frame))
    open.settled.add(contributionName(frame))
    this.#acknowledge(frame)
  }

  #acknowledge(frame: Contribution): void {
    this.#publish({ kind: 'ack', to: frame.from, name: frameName(frame) })
  }

  #receiveAck(name: string): void {
    const frame = this.#outgoing.get(name)
    if (!frame) return
    this.#outgoing.delete(name)
    const { fleetEpoch, step, slice, sliceAttempt, lease, leaseAttempt } = frame
    this.host.event({
      kind: 'contributionDelivered',
      ...{ fleetEpoch, step, slice, sliceAttempt, lease, leaseAttempt },
    })
  }

  #receiveSum(frame: Sum): void {
    if (!this.#accepted.includes(frame.step)) return
    const held = this.#adopt(frame)
    if (!held || held.chunks.has(frame.chunk)) return
    held.chunks.add(frame.chunk)
    if (!isWhole(held)) return
    held.isRequested = false
    const { step, slice } = frame
    this.host.event({
      kind: 'sumArrived',
      step,
      slice,
      digest: publishedDigest(held.value, slice),
    })
  }

  /** The sum that a frame belongs to; null: the frame is of an older attempt. */
  #adopt(frame: Sum): HeldSum | null {
    const held = this.#heldSum(frame.step, frame.slice)
    if (!held) return this.#begin(frame, frame.value)
    if (held.fleetEpoch === frame.fleetEpoch && held.sliceAttempt === frame.sliceAttempt)
      return held
    const isDirect = frame.to !== ''
    if (isDirect && isWhole(held) && !held.isRequested) return null
    const isNewer =
      frame.fleetEpoch > held.fleetEpoch ||
      (frame.fleetEpoch === held.fleetEpoch && frame.sliceAttempt > held.sliceAttempt)
    if (!isNewer && !(isDirect && held.isRequested)) return null
    if (isWhole(held)) {
      this.host.event({ kind: 'sumOverwritten', step: held.step, slice: held.slice })
    }
    const sum = this.#begin(frame, frame.value)
    sum.isRequested = held.isRequested
    return sum
  }

  #heldSum(step: number, slice: number): HeldSum | undefined {
    const held = this.#slot(step).get(slice)
    return held?.step === step ? held : undefined
  }

  #begin({ fleetEpoch, step, slice, sliceAttempt }: Key, value: bigint): HeldSum {
    const key = { fleetEpoch, step, slice, sliceAttempt }
    const sum: HeldSum = { ...key, chunks: new Set(), value, isRequested: false }
    this.#slot(step).set(slice, sum)
    return sum
  }

  #sendSum(address: Omit<Sum, 'kind' | 'fleetEpoch' | 'chunk' | 'value'>, value: bigint): void {
    for (let chunk = 0; chunk < numChunks; chunk++) {
      this.#publish({ ...address, kind: 'sum', chunk, value })
    }
  }

  #resend(frame: Contribution): void {
    if (this.#outgoing.get(frameName(frame)) !== frame) return
    for (let chunk = 0; chunk < numChunks; chunk++) this.#publish({ ...frame, chunk })
    this.host.after(resendEveryMs, () => this.#resend(frame))
  }

  #openOf(key: Key): OpenSlice | null {
    const open = this.#open.get(key.slice)
    const isSame =
      open?.key.fleetEpoch === key.fleetEpoch &&
      open.key.step === key.step &&
      open.key.sliceAttempt === key.sliceAttempt
    return isSame ? open : null
  }

  #slot(step: number): Map<number, HeldSum> {
    return this.sums[step % 2] as Map<number, HeldSum>
  }
}

const contributionName = (key: {
  fleetEpoch: number
  step: number
  lease: number
  leaseAttempt: number
}): string => `${key.fleetEpoch}/${key.step}/${key.lease}/${key.leaseAttempt}`

const frameName = (frame: Contribution): string =>
  `${contributionName(frame)}>${frame.slice}/${frame.sliceAttempt}`

const isWhole = (sum: HeldSum): boolean => sum.chunks.size === numChunks
