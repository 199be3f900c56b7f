/**
 * The worker's only door to NATS: gradient frames, credits, and the commit log in doubt.
 * No other file of the worker imports the client.
 */
import type { NatsConnection as Client } from 'nats'
import { decodeRecord, type LoggedRecord } from '../proto/commit-record.js'
import {
  connectNats,
  type NatsAddress,
  type PageQuery,
  readPage,
  readSubject,
  type StoredMessage,
} from '../proto/nats-client.js'
import { commitStream, commitSubject } from '../proto/subjects.js'

export interface BusMessage {
  subject: string
  data: Uint8Array
  reply: string | undefined
}
export type MessageListener = (message: BusMessage) => void

/** What the data plane needs of a bus; tests put a losing, doubling, damaging one in its place. */
export interface GradientTransport {
  /** Keeps `data` until flush() has resolved or rejected. Dropped where there is no connection. */
  publish(subject: string, data: Uint8Array, reply?: string): void
  /** Answers the function that ends the subscription. It survives reconnects. */
  subscribe(subject: string, listener: MessageListener): () => void
  /** The server has read everything published before; rejects when the connection breaks first. */
  flush(): Promise<void>
  /** Calls back at each loss (false) and return (true) of the connection. Answers how to stop. */
  onStatus(listener: (isUp: boolean) => void): () => void
}

export class NatsConnection implements GradientTransport {
  #isUp = true
  readonly #listeners = new Set<(isUp: boolean) => void>()

  private constructor(
    private readonly client: Client,
    private readonly user: { address: NatsAddress },
  ) {
    void this.#watch()
  }

  /** @param timeoutMs how long the server may take to answer */
  static async open(address: NatsAddress, timeoutMs = 10_000): Promise<NatsConnection> {
    const user = { address }
    const client = await connectNats(() => user.address, { timeoutMs, noEcho: true })
    return new NatsConnection(client, user)
  }

  /** From the next reconnect on; the server ends the connection when the old ones expire. */
  renew(address: NatsAddress): void {
    this.user.address = address
  }

  publish(subject: string, data: Uint8Array, reply?: string): void {
    if (!this.#isUp || this.client.isClosed()) return
    this.client.publish(subject, data, reply === undefined ? {} : { reply })
  }

  subscribe(subject: string, listener: MessageListener): () => void {
    if (this.client.isClosed()) return () => {}
    const subscription = this.client.subscribe(subject, {
      callback: (error, message) => {
        if (error !== null) return
        const { data, reply } = message
        listener({ subject: message.subject, data, reply })
      },
    })
    return () => subscription.unsubscribe()
  }

  flush(): Promise<void> {
    return this.client.flush()
  }

  onStatus(listener: (isUp: boolean) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  /** All records of a job after a sequence, in order. */
  async readCommitLog(jobId: string, afterSequence: number): Promise<LoggedRecord[]> {
    const records: LoggedRecord[] = []
    const query = { stream: commitStream, subject: commitSubject(jobId) }
    for await (const message of readSubject(this, { ...query, fromSequence: afterSequence + 1 })) {
      records.push({ sequence: message.sequence, record: decodeRecord(message.data) })
    }
    return records
  }

  readPage(query: PageQuery): Promise<StoredMessage[]> {
    return readPage(this.client, query)
  }

  async close(): Promise<void> {
    await this.client.close()
  }

  async #watch(): Promise<void> {
    for await (const status of this.client.status()) {
      if (status.type !== 'disconnect' && status.type !== 'reconnect') continue
      this.#isUp = status.type === 'reconnect'
      for (const listener of this.#listeners) listener(this.#isUp)
    }
  }
}
