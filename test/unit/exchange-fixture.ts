/**
 * Exchange buffers without an engine, and a small crew of data planes that adds one step's
 * gradients.
 */
import { planSlices, type SliceLayout } from '../../proto/slices.js'
import { callAddon } from '../../worker/addon.js'
import { DataPlane, type DataPlaneClock } from '../../worker/data-plane.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import type { GradientTransport } from '../../worker/nats-connection.js'
import type { WorkerEvent } from '../../worker/run-events.js'

/** A handle of createExchange: an exchange handle that can also round a gradient and show a sum. */
export interface TrialExchange {
  roundAndAdd(slot: number, gradient: Float32Array): Promise<void>
  published(step: number): Float32Array
}
export interface TrialOptions extends SliceLayout {
  significantBits: 24 | 12 | 8
  numContributionSlots: number
}
export const createExchange = (options: TrialOptions): TrialExchange =>
  callAddon('createExchange', options)

/** Heavy-tailed values of block-wise scales, with zeros: a pure function of the seed. */
export function gradientLike(numElements: number, seed: number): Float32Array {
  const values = new Float32Array(numElements)
  let state = seed * 2654435761
  const random = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
  for (let block = 0; block < numElements; block += 256) {
    const scale = random() < 0.05 ? 0 : 2 ** (-6 - Math.floor(random() * 16))
    for (let i = block; i < block + 256; i++) {
      const sign = random() < 0.5 ? -1 : 1
      values[i] = random() < 0.02 ? 0 : sign * scale * random() ** 4
    }
  }
  return values
}

/**
 * Timers that run `speed` times as fast. Time passes by their turns, not by the wall: a machine
 * that stands still for a second makes nobody look silent.
 */
export function fastClock(speed: number): DataPlaneClock {
  let nowMs = 0
  return {
    nowMs: () => nowMs,
    every(ms, run) {
      let dueMs = nowMs
      const turn = () => {
        dueMs += ms
        nowMs = Math.max(nowMs, dueMs)
        run()
      }
      const timer = setInterval(turn, ms / speed)
      return () => clearInterval(timer)
    },
  }
}

export interface CrewOptions {
  numWorkers: number
  numBlocks: number
  layout?: SliceLayout
  significantBits?: 24 | 12 | 8
  clock?: DataPlaneClock
  connect(workerId: string): Promise<GradientTransport>
}

/** One worker of the crew: obeys the simplest of run machines, lease k is worker k's. */
class CrewMember {
  readonly plane: DataPlane
  readonly buffers: ExchangeBuffers
  readonly trial: TrialExchange
  readonly failures: string[] = []
  readonly sums = new Map<number, string>()
  step = 0
  onChange: () => void = () => undefined
  readonly #counted = new Map<number, number>()

  constructor(
    readonly crew: Crew,
    readonly index: number,
  ) {
    const { numWorkers, clock, connect } = crew.options
    this.trial = createExchange({
      ...crew.layout,
      significantBits: crew.options.significantBits ?? 24,
      numContributionSlots: numWorkers === 1 ? crew.numLeases : 1,
    })
    this.buffers = new ExchangeBuffers(this.trial)
    this.plane = new DataPlane({
      jobId: 'job-1',
      workerId: () => this.id,
      exchange: this.buffers,
      connect: () => connect(this.id),
      onEvent: (event) => this.#onEvent(event),
      ...(clock ? { clock } : {}),
    })
  }

  get id(): string {
    return `w-${this.index}`
  }

  open(fleetEpoch: number): void {
    const workerIds = this.crew.members.map((member) => member.id)
    this.plane.carryOut({ kind: 'openEpoch', fleetEpoch, workerIds })
  }

  /** Contributes leases to every slice; as owner adds what arrives. */
  async runStep(
    step: number,
    leases: readonly { lease: number; gradient: Float32Array }[],
  ): Promise<void> {
    this.step = step
    this.sums.clear()
    this.#counted.clear()
    this.plane.carryOut({ kind: 'acceptSums', steps: [step - 1, step] })
    for (const slice of this.crew.slicesOf(this.index)) {
      this.plane.carryOut({ kind: 'openSlice', ...this.#slice(slice) })
    }
    for (const [slot, { lease, gradient }] of leases.entries()) {
      await this.buffers.clearSlot(slot)
      await this.trial.roundAndAdd(slot, gradient)
      const digests = await this.buffers.contributionDigests(slot)
      for (let slice = 0; slice < this.buffers.numSlices; slice++)
        this.#give(slot, lease, slice, digests)
    }
  }

  #give(slot: number, lease: number, slice: number, digests: readonly string[]): void {
    const owner = slice % this.crew.options.numWorkers
    const key = { ...this.#slice(slice), lease, leaseAttempt: 0 }
    if (owner === this.index) return this.#count(slot, key)
    const digest = digests[slice] ?? ''
    const ownerWorkerId = this.crew.members[owner]?.id ?? ''
    this.plane.carryOut({ kind: 'sendContribution', slot, ownerWorkerId, digest, ...key })
  }

  #count(
    slot: number | null,
    key: ReturnType<CrewMember['sliceKey']> & { lease: number; leaseAttempt: number },
  ): void {
    this.plane.carryOut({ kind: 'countContribution', slot, ...key })
    const counted = (this.#counted.get(key.slice) ?? 0) + 1
    this.#counted.set(key.slice, counted)
    if (counted < this.crew.numLeases) return
    const { fleetEpoch, step, slice, sliceAttempt } = key
    this.plane.carryOut({ kind: 'finishSlice', fleetEpoch, step, slice, sliceAttempt })
  }

  sliceKey(slice: number) {
    return { fleetEpoch: this.crew.fleetEpoch, step: this.step, slice, sliceAttempt: 0 }
  }
  #slice(slice: number) {
    return this.sliceKey(slice)
  }

  #onEvent(event: WorkerEvent): void {
    if (event.kind === 'engineFailed')
      this.failures.push(`${event.operation}: ${event.error.message}`)
    if (event.kind === 'contributionArrived') {
      const { kind: _, digest: __, ...key } = event
      this.#count(null, key)
    }
    if (event.kind === 'sliceFinished') {
      const { fleetEpoch, step, slice, sliceAttempt } = event
      this.sums.set(slice, event.publishedDigest)
      this.plane.carryOut({ kind: 'publishSum', fleetEpoch, step, slice, sliceAttempt })
    }
    if (event.kind === 'sumArrived' && event.step === this.step)
      this.sums.set(event.slice, event.digest)
    this.onChange()
  }
}

export class Crew {
  readonly layout: SliceLayout
  readonly members: CrewMember[]
  fleetEpoch = 1

  constructor(
    readonly options: CrewOptions,
    readonly numLeases = options.numWorkers,
  ) {
    this.layout = options.layout ?? planSlices(options.numBlocks)
    this.members = []
    for (let i = 0; i < options.numWorkers; i++) this.members.push(new CrewMember(this, i))
  }

  slicesOf(index: number): number[] {
    const { numBlocks, sliceBlocks } = this.layout
    const all = Array.from({ length: Math.ceil(numBlocks / sliceBlocks) }, (_, slice) => slice)
    return all.filter((slice) => slice % this.options.numWorkers === index)
  }

  openEpoch(fleetEpoch: number): void {
    this.fleetEpoch = fleetEpoch
    for (const member of this.members) member.open(fleetEpoch)
  }

  /**
   * Lease k goes to worker k mod N. Resolves when every worker holds every slice's sum; answers the
   * digests.
   */
  async step(step: number, gradients: readonly Float32Array[]): Promise<string[]> {
    const numWorkers = this.members.length
    const isWhole = () => this.members.every((m) => m.sums.size === m.buffers.numSlices)
    await new Promise<void>((resolve, reject) => {
      for (const member of this.members) {
        member.onChange = () => {
          if (member.failures.length > 0) reject(new Error(member.failures.join('\n')))
          else if (isWhole()) resolve()
        }
        const leases = gradients
          .map((gradient, lease) => ({ lease, gradient }))
          .filter(({ lease }) => lease % numWorkers === member.index)
        member.runStep(step, leases).catch(reject)
      }
    })
    const [first] = this.members
    return [...(first?.sums ?? [])].sort(([a], [b]) => a - b).map(([, digest]) => digest)
  }

  async close(): Promise<void> {
    for (const member of this.members) await member.plane.close()
  }
}
