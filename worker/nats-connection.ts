/**
 * The worker's only door to NATS: gradient frames, credits, and the commit log in doubt.
 * No other file of the worker imports the client.
 */
import { setTimeout as delay } from 'node:timers/promises'
import { type NatsConnection as Client, connect, RequestStrategy } from 'nats'
import { decodeRecord, type LoggedRecord } from '../proto/commit-record.js'
import { TunemeshError } from '../proto/errors.js'
import { commitStream, commitSubject } from '../proto/subjects.js'

export type MessageListener = (data: Uint8Array, reply: string | undefined) => void

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

export interface NatsAddress {
  url: string
  user?: string
  password?: string
}

const requestTimeoutMs = 5_000
const pageRecords = 256

export class NatsConnection implements GradientTransport {
  #isUp = true
  readonly #listeners = new Set<(isUp: boolean) => void>()

  private constructor(private readonly client: Client) {
    void this.#watch()
  }

  /** @param timeoutMs how long the server may take to answer */
  static async open(address: NatsAddress, timeoutMs = 10_000): Promise<NatsConnection> {
    const deadline = performance.now() + timeoutMs
    for (;;) {
      try {
        return new NatsConnection(
          await connect({
            servers: address.url,
            ...(address.user === undefined ? {} : { user: address.user }),
            ...(address.password === undefined ? {} : { pass: address.password }),
            name: 'worker',
            noEcho: true,
            maxReconnectAttempts: -1,
            reconnectTimeWait: 100,
            reconnectJitter: 100,
            pingInterval: 5_000,
            maxPingOut: 2,
            timeout: 2_000,
          }),
        )
      } catch (cause) {
        if (performance.now() > deadline) {
          throw new TunemeshError(
            'NATS_UNREACHABLE',
            `nats-server at ${address.url} did not answer within ${timeoutMs} ms. Is it running?`,
            { cause },
          )
        }
        await delay(50)
      }
    }
  }

  publish(subject: string, data: Uint8Array, reply?: string): void {
    if (!this.#isUp || this.client.isClosed()) return
    this.client.publish(subject, data, reply === undefined ? {} : { reply })
  }

  subscribe(subject: string, listener: MessageListener): () => void {
    if (this.client.isClosed()) return () => {}
    const subscription = this.client.subscribe(subject, {
      callback: (error, message) => {
        if (error === null) listener(message.data, message.reply)
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
    let fromSequence = afterSequence + 1
    for (;;) {
      const page = await this.#readPage(commitSubject(jobId), fromSequence)
      records.push(...page)
      const last = page.at(-1)
      if (last === undefined || page.length < pageRecords) return records
      fromSequence = last.sequence + 1
    }
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

  async #readPage(subject: string, fromSequence: number): Promise<LoggedRecord[]> {
    const query = { seq: fromSequence, next_by_subj: subject, batch: pageRecords }
    const replies = await this.client.requestMany(
      `$JS.API.DIRECT.GET.${commitStream}`,
      JSON.stringify(query),
      { strategy: RequestStrategy.SentinelMsg, maxWait: requestTimeoutMs },
    )
    const records: LoggedRecord[] = []
    for await (const { headers, data } of replies) {
      const code = headers?.code ?? 0
      // 204 ends the batch, 404 says that nothing lies there or beyond.
      if (code === 204 || code === 404) return records
      if (code >= 400) throw unreadable(headers?.description ?? String(code))
      const sequence = Number(headers?.get('Nats-Sequence'))
      records.push({ sequence, record: decodeRecord(data) })
    }
    throw unreadable('the reply ended half way')
  }
}

const unreadable = (reason: string) =>
  new TunemeshError('NATS_UNREACHABLE', `The commit log could not be read: ${reason}.`)
