/**
 * Frames between simulated workers: two chunks a message, resent until acknowledged, staged by
 * attempt, sums in two slots by the parity of their step. What worker/data-plane.ts promises,
 * without bytes.
 */
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { addWrapped, publishedDigest } from './toy-engine.js'

const numChunks = 2
const resendEveryMs = 40
const mostStaged = 64

export type Frame =
  | {
      kind: 'contribution'
      fleetEpoch: number
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
      /** 0: answered to a request, whatever epoch. */
      fleetEpoch: number
      step: number
      slice: number
      sliceAttempt: number
      chunk: number
      value: bigint
      to: string
    }
  | { kind: 'sumRequest'; step: number; slice: number; digest: string; to: string; from: string }
  | { kind: 'sumRefusal'; step: number; slice: number; to: string; from: string }

type Contribution = Extract<Frame, { kind: 'contribution' }>
type Effect<Kind extends WorkerEffect['kind']> = Extract<WorkerEffect, { kind: Kind }>
type Key = Pick<Contribution, 'fleetEpoch' | 'step' | 'slice' | 'sliceAttempt'>

interface OpenSlice {
  key: Key
  staged: Map<string, { chunks: Set<number>; frame: Contribution; hasArrived: boolean }>
  /** Attempts counted or dropped: acknowledged again when sent again. */
  settled: Set<string>
  accumulator: bigint
}

interface HeldSum {
  step: number
  tag: string
  chunks: Set<number>
  value: bigint
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
    this.#accepted = []
    for (const slot of this.sums) slot.clear()
  }

  openEpoch(fleetEpoch: number): void {
    if (fleetEpoch === this.#fleetEpoch) return
    this.#fleetEpoch = fleetEpoch
    this.#open.clear()
    this.#outgoing.clear()
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
    this.#slot(key.step).set(key.slice, {
      step: key.step,
      tag: sumTag(key),
      chunks: new Set([0, 1]),
      value,
    })
  }

  publishSum(key: Key): void {
    const held = this.#slot(key.step).get(key.slice)
    if (held?.step === key.step) this.#sendSum({ ...key, to: '' }, held.value)
  }

  sendSum(step: number, slice: number, to: string): void {
    const held = this.#slot(step).get(slice)
    if (held?.step !== step) return
    this.#sendSum({ fleetEpoch: 0, step, slice, sliceAttempt: 0, to }, held.value)
  }

  receive(frame: Frame): void {
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
    this.host.publish({ kind: 'ack', to: frame.from, name: frameName(frame) })
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

  #receiveSum(frame: Extract<Frame, { kind: 'sum' }>): void {
    if (frame.fleetEpoch !== 0 && frame.fleetEpoch !== this.#fleetEpoch) return
    if (!this.#accepted.includes(frame.step)) return
    const slot = this.#slot(frame.step)
    const tag = sumTag(frame)
    let held = slot.get(frame.slice)
    if (!held || held.step !== frame.step || held.tag !== tag) {
      if (held) {
        this.host.event({ kind: 'sumOverwritten', step: held.step, slice: frame.slice })
      }
      held = { step: frame.step, tag, chunks: new Set(), value: frame.value }
      slot.set(frame.slice, held)
    }
    if (held.chunks.has(frame.chunk)) return
    held.chunks.add(frame.chunk)
    if (held.chunks.size < numChunks) return
    const { step, slice } = frame
    this.host.event({
      kind: 'sumArrived',
      step,
      slice,
      digest: publishedDigest(held.value, slice),
    })
  }

  #sendSum(
    address: Omit<Extract<Frame, { kind: 'sum' }>, 'kind' | 'chunk' | 'value'>,
    value: bigint,
  ): void {
    for (let chunk = 0; chunk < numChunks; chunk++) {
      this.host.publish({ ...address, kind: 'sum', chunk, value })
    }
  }

  #resend(frame: Contribution): void {
    if (this.#outgoing.get(frameName(frame)) !== frame) return
    for (let chunk = 0; chunk < numChunks; chunk++) this.host.publish({ ...frame, chunk })
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

/** Requested sums have no attempt: their value tells them apart. */
const sumTag = (key: { fleetEpoch: number; sliceAttempt: number; value?: bigint }): string =>
  key.fleetEpoch === 0 ? `asked ${key.value}` : `${key.fleetEpoch}/${key.sliceAttempt}`
