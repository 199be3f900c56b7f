/**
 * One fleet epoch's way to the bus: subscriptions, credits, and frames sent from a few slab slots.
 */
import { type CreditMessage, encodeCredit } from '../proto/frame.js'
import { creditSubject, senderOf, sentBy, sentByAnyone } from '../proto/subjects.js'
import type { ExchangeBuffers } from './exchange-buffers.js'
import type { BusMessage, GradientTransport } from './nats-connection.js'
import type { WorkerEvent } from './run-events.js'

/** What happened on the wire since the data plane was opened. */
export interface DataPlaneCounts {
  framesSent: number
  bytesSent: number
  framesReceived: number
  bytesReceived: number
  /** Damaged frames: refused and asked for again. */
  framesRefused: number
  /** Doubled, ungranted or outdated frames: ignored. */
  framesIgnored: number
  /** Credits that name another sender than their subject does: dropped. */
  creditsRefused: number
  /** Most bytes of contributions staged at once. */
  peakStagedBytes: number
}

/** What the parts of the data plane share within one fleet epoch. */
export interface EpochScope {
  readonly jobId: string
  readonly jobHash: bigint
  readonly fleetEpoch: number
  readonly workerId: string
  /** Of the epoch, this one included. */
  readonly workerIds: readonly string[]
  readonly exchange: ExchangeBuffers
  readonly link: DataPlaneLink
  readonly counts: DataPlaneCounts
  readonly nowMs: () => number
  readonly emit: (event: WorkerEvent) => void
  /** A failure of this machine's own work: the run machine decides. */
  readonly fail: (operation: string, step: number, error: unknown) => void
}

/** A share of the trained vector that is packed and published chunk by chunk. */
export interface Shipment {
  readonly subject: string
  /** Chunks still to go, first to last. Empty: nothing to do for now. */
  readonly pending: number[]
  isCancelled: boolean
  /** How many more chunks the receivers' credit allows now. */
  room(): number
  pack(chunks: readonly number[], frames: readonly number[]): Promise<number[]>
  sent(chunk: number, bytes: number): void
  /** As many chunks as were given to pack() have been sent, or given up. */
  handedOver?(numChunks: number): void
  failed(error: unknown): void
  /** The server has read what was sent so far, or the connection has gone. */
  flushed?(): void
}

/** @param sender as the bus vouches for: its server lets a worker publish under its own id only */
export type SentMessage = BusMessage & { sender: string }

/** Chunks packed by one native call. */
const batchChunks = 4

export class DataPlaneLink {
  readonly #replySubject: string
  readonly #subscriptions: (() => void)[] = []
  readonly #shipments = new Set<Shipment>()
  readonly #freeFrames: number[]
  #isUp = true
  #isClosed = false

  constructor(
    private readonly transport: GradientTransport,
    private readonly scope: Omit<EpochScope, 'link'>,
    onReturn: () => void,
  ) {
    const { jobId, fleetEpoch, workerId, exchange } = scope
    this.#replySubject = creditSubject(jobId, fleetEpoch, workerId)
    this.#freeFrames = Array.from({ length: exchange.numFrameSlots }, (_, slot) => slot)
    this.#subscriptions.push(
      transport.onStatus((isUp) => {
        this.#isUp = isUp
        // What was under way may be lost: the parts send again what is not acknowledged.
        if (isUp) onReturn()
        if (isUp) this.pump()
      }),
    )
  }

  /** Whoever sends there. Answers the function that ends the subscription. */
  subscribe(subject: string, listener: (message: SentMessage) => void): () => void {
    const end = this.transport.subscribe(sentByAnyone(subject), (message) => {
      if (!this.#isClosed) listener({ ...message, sender: senderOf(message.subject) })
    })
    this.#subscriptions.push(end)
    return end
  }

  /** To a worker's id, or to the credit subject that a frame named as its reply. */
  credit(to: { workerId: string } | { subject: string }, message: CreditBody): void {
    const { jobId, fleetEpoch, workerId } = this.scope
    const subject = 'subject' in to ? to.subject : creditSubject(jobId, fleetEpoch, to.workerId)
    const whole = { ...message, from: workerId } as CreditMessage
    this.transport.publish(sentBy(subject, workerId), encodeCredit(whole))
  }

  ship(shipment: Shipment): void {
    this.#shipments.add(shipment)
    this.pump()
  }

  /** Starts whatever credit, free slots and the connection allow; the shipments take turns. */
  pump(): void {
    if (!this.#isUp || this.#isClosed) return
    for (const shipment of [...this.#shipments]) {
      if (shipment.isCancelled || shipment.pending.length === 0) {
        this.#shipments.delete(shipment)
        continue
      }
      if (this.#freeFrames.length === 0) return
      const room = Math.min(shipment.room(), this.#freeFrames.length, batchChunks)
      if (room <= 0) continue
      const chunks = shipment.pending.splice(0, room)
      this.#shipments.delete(shipment)
      this.#shipments.add(shipment)
      void this.#send(shipment, chunks)
    }
  }

  close(): void {
    this.#isClosed = true
    this.#shipments.clear()
    for (const end of this.#subscriptions) end()
  }

  /** Frame slots are free again when the server has read them, or the connection has gone. */
  async #send(shipment: Shipment, chunks: number[]): Promise<void> {
    const slots = this.#freeFrames.splice(0, chunks.length)
    try {
      await this.#packAndPublish(shipment, chunks, slots)
      this.pump()
      await this.transport.flush().catch(() => undefined)
      shipment.flushed?.()
    } catch (error) {
      shipment.isCancelled = true
      shipment.failed(error)
    } finally {
      this.#freeFrames.push(...slots)
      this.pump()
    }
  }

  async #packAndPublish(shipment: Shipment, chunks: number[], slots: number[]): Promise<void> {
    try {
      const sizes = await shipment.pack(chunks, slots)
      for (const [index, bytes] of sizes.entries()) {
        if (shipment.isCancelled || this.#isClosed) break
        this.#publish(shipment, this.scope.exchange.frame(slots[index] ?? 0, bytes))
        shipment.sent(chunks[index] ?? 0, bytes)
      }
    } finally {
      shipment.handedOver?.(chunks.length)
    }
  }

  #publish(shipment: Shipment, frame: Uint8Array): void {
    const subject = sentBy(shipment.subject, this.scope.workerId)
    this.transport.publish(subject, frame, this.#replySubject)
    this.scope.counts.framesSent++
    this.scope.counts.bytesSent += frame.byteLength
  }
}

type WithoutSender<Message> = Message extends CreditMessage ? Omit<Message, 'from'> : never
export type CreditBody = WithoutSender<CreditMessage>
