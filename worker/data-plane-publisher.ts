/**
 * Sends sums out: one publish that the server fans out to every worker of the epoch, or the frames
 * of one slice to a worker that asked. Paced by the receivers' acknowledgements, so that no
 * subscriber has more than 16 MiB of all owners' sums pending at the server.
 */
import { failpoint } from '../proto/failpoint.js'
import type { CreditOf } from '../proto/frame.js'
import { creditSubject, sumSubject } from '../proto/subjects.js'
import type { EpochScope, Shipment } from './data-plane-link.js'

interface SumKey {
  step: number
  slice: number
  sliceAttempt: number
}

/** Over all owners; each takes an equal part of it. */
const pendingBytesLimit = 16 << 20
const firstResendMs = 1_000
/** Then the receiver is taken for gone; it can still ask for the sum. */
const maxResends = 3

/** This owner's part of what one subscriber may have pending. */
export const fanOutBytes = (numWorkers: number) =>
  Math.max(1 << 20, Math.floor(pendingBytesLimit / numWorkers))

interface Receiver {
  /** Bytes of each chunk sent and not acknowledged; 0: not sent yet. */
  unacknowledged: Map<number, number>
  lastMs: number
  numResends: number
}

class FanOut implements Shipment {
  readonly pending: number[]
  isCancelled = false
  readonly receivers = new Map<string, Receiver>()
  #hasSent = false

  constructor(
    private readonly scope: EpochScope,
    private readonly publisher: DataPlanePublisher,
    readonly key: SumKey,
    readonly subject: string,
    workerIds: readonly string[],
  ) {
    const numChunks = scope.exchange.numChunks(key.slice)
    this.pending = Array.from({ length: numChunks }, (_, chunk) => chunk)
    for (const workerId of workerIds) {
      const unacknowledged = new Map(this.pending.map((chunk) => [chunk, 0]))
      this.receivers.set(workerId, { unacknowledged, lastMs: scope.nowMs(), numResends: 0 })
    }
  }

  room(): number {
    return this.publisher.room(this.receivers.keys())
  }

  async pack(chunks: readonly number[], frames: readonly number[]): Promise<number[]> {
    this.publisher.notePacking(chunks.length)
    const { jobHash, fleetEpoch } = this.scope
    const header = { jobHash, fleetEpoch, ...this.key, lease: 0, leaseAttempt: 0 }
    const sizes = await this.scope.exchange.packPublished({ header, chunks, frames })
    // The frames of an earlier call are on their way since.
    if (this.#hasSent) failpoint('worker.mid-publish')
    return sizes
  }

  sent(chunk: number, bytes: number): void {
    this.#hasSent = true
    this.publisher.noteFrameBytes(bytes)
    for (const [workerId, receiver] of this.receivers) {
      if (receiver.unacknowledged.get(chunk) !== 0) continue
      receiver.unacknowledged.set(chunk, bytes)
      receiver.lastMs = this.scope.nowMs()
      this.publisher.addOutstanding(workerId, bytes)
    }
  }

  handedOver(numChunks: number): void {
    this.publisher.notePacking(-numChunks)
  }

  failed(error: unknown): void {
    this.scope.fail('publishSum', this.key.step, error)
  }

  flushed(): void {
    if (this.pending.length === 0 && !this.isCancelled) failpoint('worker.after-publish')
  }

  acknowledge(workerId: string, chunks: readonly number[]): void {
    const receiver = this.receivers.get(workerId)
    if (receiver === undefined) return
    for (const chunk of chunks) {
      this.publisher.addOutstanding(workerId, -(receiver.unacknowledged.get(chunk) ?? 0))
      receiver.unacknowledged.delete(chunk)
    }
    receiver.lastMs = this.scope.nowMs()
    receiver.numResends = 0
    if (receiver.unacknowledged.size === 0) this.receivers.delete(workerId)
  }

  /** What is taken for lost stands no longer against the receiver's window. */
  sendAgain(receiver: [workerId: string, Receiver], chunks: Iterable<number>): void {
    const [workerId, { unacknowledged }] = receiver
    for (const chunk of chunks) {
      const bytes = unacknowledged.get(chunk)
      if (bytes === undefined) continue
      unacknowledged.set(chunk, 0)
      this.publisher.addOutstanding(workerId, -bytes)
      if (!this.pending.includes(chunk)) this.pending.push(chunk)
    }
  }

  /** Chunks that went out and that a receiver has not acknowledged. */
  sentTo(receiver: Receiver): number[] {
    return [...receiver.unacknowledged].filter(([, bytes]) => bytes > 0).map(([chunk]) => chunk)
  }

  forget(workerId: string): void {
    const receiver = this.receivers.get(workerId)
    if (receiver) this.acknowledge(workerId, [...receiver.unacknowledged.keys()])
  }

  cancel(): void {
    this.isCancelled = true
    for (const workerId of [...this.receivers.keys()]) this.forget(workerId)
  }
}

export class DataPlanePublisher {
  readonly #fanOuts = new Set<FanOut>()
  readonly #outstanding = new Map<string, number>()
  /** Workers that did not answer: not waited for until they are heard of again. */
  readonly #silent = new Set<string>()
  readonly #windowBytes: number
  #frameBytes: number
  /** Chunks of all slices on their way out: counted against every worker until they are sent. */
  #numPacking = 0

  constructor(private readonly scope: EpochScope) {
    this.#windowBytes = fanOutBytes(scope.workerIds.length)
    this.#frameBytes = scope.exchange.layout.chunkBlocks * 1024
  }

  publish(key: SumKey): void {
    failpoint('worker.before-publish')
    const { jobId, fleetEpoch, workerId, workerIds } = this.scope
    const others = workerIds.filter((id) => id !== workerId && !this.#silent.has(id))
    this.#start(key, sumSubject({ job: jobId, fleetEpoch, ...key }), others)
  }

  /** To one worker, on its credit subject. */
  sendTo(workerId: string, key: SumKey): void {
    const { jobId, fleetEpoch } = this.scope
    this.#silent.delete(workerId)
    this.#start(key, creditSubject(jobId, fleetEpoch, workerId), [workerId])
  }

  receive(message: CreditOf<'stored' | 'needSum'>): void {
    this.#silent.delete(message.from)
    for (const fanOut of this.#fanOuts) {
      if (!isSame(fanOut.key, message)) continue
      if (message.kind === 'stored') fanOut.acknowledge(message.from, message.chunks)
      else this.#sendAgain(fanOut, message)
      this.#settle(fanOut)
    }
    this.scope.link.pump()
  }

  /** The sum slot of this step is about to hold another step's slice. */
  slotReused(step: number, slice: number): void {
    for (const fanOut of [...this.#fanOuts]) {
      const { key } = fanOut
      if (key.slice !== slice || key.step === step || (key.step - step) % 2 !== 0) continue
      fanOut.cancel()
      this.#fanOuts.delete(fanOut)
    }
  }

  tick(): void {
    const nowMs = this.scope.nowMs()
    for (const fanOut of [...this.#fanOuts]) {
      for (const [workerId, receiver] of [...fanOut.receivers]) {
        const late = fanOut.sentTo(receiver)
        if (late.length === 0) continue
        if (nowMs - receiver.lastMs < firstResendMs * 2 ** receiver.numResends) continue
        if (receiver.numResends++ >= maxResends) this.#giveUp(workerId)
        else fanOut.sendAgain([workerId, receiver], late)
        receiver.lastMs = nowMs
      }
      this.#settle(fanOut)
      if (fanOut.pending.length > 0) this.scope.link.ship(fanOut)
    }
  }

  connectionReturned(): void {
    for (const fanOut of this.#fanOuts) {
      for (const entry of fanOut.receivers) fanOut.sendAgain(entry, fanOut.sentTo(entry[1]))
      this.scope.link.ship(fanOut)
    }
  }

  close(): void {
    for (const fanOut of this.#fanOuts) fanOut.cancel()
    this.#fanOuts.clear()
  }

  /** Chunks that every one of the workers may still be sent. */
  room(workerIds: Iterable<string>): number {
    let room = Number.POSITIVE_INFINITY
    for (const workerId of workerIds) {
      const outstanding = this.#outstanding.get(workerId) ?? 0
      const free = Math.floor((this.#windowBytes - outstanding) / this.#frameBytes)
      // A frame beyond the window goes alone.
      const least = outstanding === 0 && this.#numPacking === 0 ? 1 : 0
      room = Math.min(room, Math.max(least, free - this.#numPacking))
    }
    return Number.isFinite(room) ? room : 0
  }

  addOutstanding(workerId: string, bytes: number): void {
    this.#outstanding.set(workerId, (this.#outstanding.get(workerId) ?? 0) + bytes)
  }

  notePacking(numChunks: number): void {
    this.#numPacking += numChunks
  }

  noteFrameBytes(bytes: number): void {
    this.#frameBytes = Math.max(bytes, Math.floor(this.#frameBytes * 0.9))
  }

  #start(key: SumKey, subject: string, workerIds: readonly string[]): void {
    if (workerIds.length === 0) return
    for (const fanOut of this.#fanOuts) {
      if (fanOut.subject === subject && isSame(fanOut.key, key)) return
    }
    const fanOut = new FanOut(this.scope, this, key, subject, workerIds)
    this.#fanOuts.add(fanOut)
    this.scope.link.ship(fanOut)
  }

  #sendAgain(fanOut: FanOut, message: CreditOf<'needSum'>): void {
    const receiver = fanOut.receivers.get(message.from)
    if (receiver === undefined) return
    fanOut.sendAgain([message.from, receiver], message.chunks)
    this.scope.link.ship(fanOut)
  }

  #giveUp(workerId: string): void {
    this.#silent.add(workerId)
    for (const fanOut of this.#fanOuts) fanOut.forget(workerId)
  }

  /** Sent and acknowledged by all that answer: forgotten. */
  #settle(fanOut: FanOut): void {
    if (fanOut.receivers.size > 0) return
    fanOut.cancel()
    this.#fanOuts.delete(fanOut)
  }
}

const isSame = (a: SumKey, b: SumKey) =>
  a.step === b.step && a.slice === b.slice && a.sliceAttempt === b.sliceAttempt
