/** The two ways in which a worker of `bench exchange` moves a step's gradients. */
import { planSlices } from '../../proto/slices.js'
import { callAddon } from '../../worker/addon.js'
import { DataPlane } from '../../worker/data-plane.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import type { NatsConnection } from '../../worker/nats-connection.js'
import type { WorkerEvent } from '../../worker/run-events.js'

export type Codec = 'q24' | 'q12' | 'q8' | 'fp32'
const significantBits = { q24: 24, q12: 12, q8: 8, fp32: 24 }

export interface WorkerSetup {
  url: string
  index: number
  numWorkers: number
  numBlocks: number
  codec: Codec
}

/** Moves one step's gradients in one worker process. */
interface Mover {
  readonly counts: { bytesSent: number; bytesReceived: number }
  step(step: number): Promise<void>
  close(): Promise<void>
}

interface TrialExchange {
  roundAndAdd(slot: number, gradient: Float32Array): Promise<void>
}

/** The data plane with the simplest of run machines: lease i is worker i's, slices go round. */
export class ExchangeMover implements Mover {
  readonly #plane: DataPlane
  readonly #buffers: ExchangeBuffers
  readonly #workerIds: string[]
  #step = 0
  #sums = 0
  #counted = new Map<number, number>()
  #whole: () => void = () => undefined

  static async open(setup: WorkerSetup, connection: NatsConnection): Promise<ExchangeMover> {
    const trial = callAddon<TrialExchange>('createExchange', {
      ...planSlices(setup.numBlocks),
      significantBits: significantBits[setup.codec],
      numContributionSlots: 1,
    })
    return new ExchangeMover(setup, connection, trial, gradient(setup))
  }

  private constructor(
    private readonly setup: WorkerSetup,
    connection: NatsConnection,
    private readonly trial: TrialExchange,
    private readonly gradient: Float32Array,
  ) {
    this.#buffers = new ExchangeBuffers(trial)
    this.#workerIds = Array.from({ length: setup.numWorkers }, (_, i) => `w-${i}`)
    this.#plane = new DataPlane({
      jobId: 'bench',
      workerId: () => `w-${setup.index}`,
      exchange: this.#buffers,
      connect: async () => connection,
      onEvent: (event) => this.#onEvent(event),
    })
    this.#plane.carryOut({ kind: 'openEpoch', fleetEpoch: 1, workerIds: this.#workerIds })
  }

  get counts() {
    return this.#plane.counts
  }

  async step(step: number): Promise<void> {
    const { index, numWorkers } = this.setup
    this.#step = step
    this.#sums = 0
    this.#counted = new Map()
    const whole = new Promise<void>((resolve) => {
      this.#whole = resolve
    })
    this.#plane.carryOut({ kind: 'acceptSums', steps: [step] })
    for (let slice = index; slice < this.#buffers.numSlices; slice += numWorkers) {
      this.#plane.carryOut({ kind: 'openSlice', ...this.#key(slice) })
    }
    await this.#buffers.clearSlot(0)
    await this.trial.roundAndAdd(0, this.gradient)
    const digests = await this.#buffers.contributionDigests(0)
    // Each worker starts at another slice, so that not all send to one owner at once.
    for (let i = 0; i < digests.length; i++) {
      const slice = (i + index) % digests.length
      const key = { ...this.#key(slice), lease: index, leaseAttempt: 0 }
      const ownerWorkerId = this.#workerIds[slice % numWorkers] ?? ''
      const digest = digests[slice] ?? ''
      if (slice % numWorkers === index) this.#count(0, key)
      else
        this.#plane.carryOut({ kind: 'sendContribution', slot: 0, ownerWorkerId, digest, ...key })
    }
    await whole
  }

  close(): Promise<void> {
    return this.#plane.close()
  }

  #key(slice: number) {
    return { fleetEpoch: 1, step: this.#step, slice, sliceAttempt: 0 }
  }

  #count(slot: number | null, key: ReturnType<ExchangeMover['leaseKey']>): void {
    this.#plane.carryOut({ kind: 'countContribution', slot, ...key })
    const counted = (this.#counted.get(key.slice) ?? 0) + 1
    this.#counted.set(key.slice, counted)
    if (counted === this.setup.numWorkers) {
      this.#plane.carryOut({ kind: 'finishSlice', ...this.#key(key.slice) })
    }
  }
  leaseKey(slice: number) {
    return { ...this.#key(slice), lease: 0, leaseAttempt: 0 }
  }

  #onEvent(event: WorkerEvent): void {
    if (event.kind === 'engineFailed') throw new Error(`${event.operation}: ${event.error.message}`)
    if (event.kind === 'contributionArrived') {
      const { kind: _, digest: __, ...key } = event
      this.#count(null, key)
    } else if (event.kind === 'sliceFinished') {
      this.#plane.carryOut({ kind: 'publishSum', ...this.#key(event.slice) })
      this.#hold()
    } else if (event.kind === 'sumArrived') this.#hold()
  }

  #hold(): void {
    if (++this.#sums === this.#buffers.numSlices) this.#whole()
  }
}

/** 1 MiB messages of float32, eight unacknowledged at a time to each receiver: nothing else. */
export class PlainMover implements Mover {
  readonly counts = { bytesSent: 0, bytesReceived: 0 }
  readonly #values: Uint8Array
  readonly #credit = new Map<string, number>()
  #received = { contributions: 0, sums: 0 }
  #waiting: (() => void)[] = []

  constructor(
    private readonly setup: WorkerSetup,
    private readonly connection: NatsConnection,
  ) {
    this.#values = new Uint8Array(gradient(setup).buffer)
    const { index } = setup
    for (const kind of ['contributions', 'sums'] as const) {
      const subject = kind === 'sums' ? 'bench.sums' : `bench.contributions.${index}`
      connection.subscribe(subject, ({ data, reply }) => {
        this.counts.bytesReceived += data.byteLength
        this.#received[kind] += data.byteLength
        connection.publish(reply ?? '', new Uint8Array(0), `${kind}.${index}`)
        this.#changed()
      })
    }
    connection.subscribe(`bench.credit.${index}`, ({ reply: from = '' }) => {
      this.#credit.set(from, (this.#credit.get(from) ?? 0) - 1)
      this.#changed()
    })
  }

  async step(): Promise<void> {
    const { index, numWorkers } = this.setup
    const share = Math.floor(this.#values.byteLength / numWorkers)
    const others = Array.from({ length: numWorkers }, (_, i) => i).filter((i) => i !== index)
    const sent = others.map((owner) =>
      this.#send(`bench.contributions.${owner}`, [`contributions.${owner}`], owner * share),
    )
    await Promise.all(sent)
    const contributed = (numWorkers - 1) * share
    await this.#until(() => this.#received.contributions >= contributed)
    this.#received.contributions -= contributed
    await this.#send(
      'bench.sums',
      others.map((i) => `sums.${i}`),
      index * share,
    )
    await this.#until(() => this.#received.sums >= contributed)
    this.#received.sums -= contributed
  }

  async close(): Promise<void> {}

  /** A worker's share, from `offset` on; waits for each of the receivers. */
  async #send(subject: string, receivers: string[], offset: number): Promise<void> {
    const share = Math.floor(this.#values.byteLength / this.setup.numWorkers)
    const messageBytes = (1 << 20) - 64
    for (let at = 0; at < share; at += messageBytes) {
      await this.#until(() => receivers.every((name) => (this.#credit.get(name) ?? 0) < 8))
      const end = Math.min(at + messageBytes, share)
      const message = this.#values.subarray(offset + at, offset + end)
      this.connection.publish(subject, message, `bench.credit.${this.setup.index}`)
      this.counts.bytesSent += message.byteLength
      for (const name of receivers) this.#credit.set(name, (this.#credit.get(name) ?? 0) + 1)
    }
  }

  async #until(isTrue: () => boolean): Promise<void> {
    while (!isTrue()) await new Promise<void>((resolve) => this.#waiting.push(resolve))
  }
  #changed(): void {
    for (const resolve of this.#waiting.splice(0)) resolve()
  }
}

/** Values of block-wise scales; another vector for each worker. */
function gradient({ numBlocks, index }: WorkerSetup): Float32Array {
  const values = new Float32Array(numBlocks * 256)
  let state = index + 1
  for (let i = 0; i < values.length; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    const tail = (state >>> 8) / 2 ** 24
    values[i] = (state & 1 ? -1 : 1) * tail * tail * tail * 2 ** (-8 - ((i >>> 8) % 13))
  }
  return values
}
