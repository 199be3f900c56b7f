/**
 * The coordinator's only door to NATS: connects, reconnects for ever, reads and writes streams.
 * No other file here imports the client.
 */
import { setTimeout as delay } from 'node:timers/promises'
import {
  type NatsConnection as Client,
  NatsError,
  ErrorCode as NatsErrorCode,
  StorageType,
  type StreamConfig,
} from 'nats'
import { TunemeshError } from '../proto/errors.js'
import {
  connectNats,
  type NatsAddress,
  type PageQuery,
  readPage,
  type StoredMessage,
} from '../proto/nats-client.js'

/** The server's code for an append whose expected last sequence is not the subject's last. */
const wrongLastSequence = 10071
const requestTimeoutMs = 5_000
/** Together about half a minute: longer than a restart of nats-server takes. */
const maxReadAttempts = 30
const readRetryMs = 1_000

export const fileStorage = StorageType.File

/** What became of an append: `unknown` must be settled by reading before it is tried again. */
export type AppendResult =
  | { outcome: 'ok'; sequence: number }
  | { outcome: 'conflict' }
  | { outcome: 'unknown'; reason: string }

export class NatsConnection {
  private readonly listeners = new Set<(isUp: boolean) => void>()
  private isUp = true

  private constructor(private readonly client: Client) {
    void this.followStatus()
  }

  /** @param timeoutMs how long the server may take to come up */
  static async open(address: NatsAddress, timeoutMs: number): Promise<NatsConnection> {
    return new NatsConnection(await connectNats(() => address, { timeoutMs, noEcho: false }))
  }

  /**
   * Calls back at each loss and return of the connection, until the returned function is called.
   */
  onStatus(onChange: (isUp: boolean) => void): () => void {
    this.listeners.add(onChange)
    return () => this.listeners.delete(onChange)
  }

  async request(subject: string, payload: Uint8Array | string = ''): Promise<Uint8Array> {
    const reply = await this.client.request(subject, payload, { timeout: requestTimeoutMs })
    return reply.data
  }

  /** Creates the stream, or brings an existing one to this configuration. */
  async ensureStream(config: Partial<StreamConfig> & { name: string }): Promise<void> {
    const manager = await this.client.jetstreamManager({ timeout: requestTimeoutMs })
    try {
      await manager.streams.info(config.name)
      await manager.streams.update(config.name, config)
    } catch (error) {
      if (!isStreamMissing(error)) throw error
      await manager.streams.add(config)
    }
  }

  /** Compare-and-set append: refused unless `expectedLast` is the last sequence on this subject. */
  async append(subject: string, data: Uint8Array, expectedLast: number): Promise<AppendResult> {
    // Not sent: the client would keep it and send it at some later time.
    if (!this.isUp) return { outcome: 'unknown', reason: 'nats-server is away' }
    try {
      const stream = this.client.jetstream({ timeout: requestTimeoutMs })
      const expect = { lastSubjectSequence: expectedLast }
      const ack = await this.whileUp(stream.publish(subject, data, { expect }))
      return { outcome: 'ok', sequence: ack.seq }
    } catch (error) {
      return refusalOf(error)
    }
  }

  /** The last message of a subject, from the stream's leader; null: there is none. */
  async readLast(stream: string, subject: string): Promise<StoredMessage | null> {
    return this.retried(async () => {
      const options = { timeout: requestTimeoutMs, checkAPI: false }
      const manager = await this.client.jetstreamManager(options)
      try {
        const message = await manager.streams.getMessage(stream, { last_by_subj: subject })
        return { sequence: message.seq, data: message.data }
      } catch (error) {
        if (isMessageMissing(error)) return null
        throw error
      }
    })
  }

  /**
   * Up to `limit` messages of a subject (wildcards allowed) from a stream sequence on, in order.
   * Fewer than `limit` means that nothing follows.
   */
  readPage(query: PageQuery): Promise<StoredMessage[]> {
    return this.retried(() => readPage(this.client, query))
  }

  async close(): Promise<void> {
    await this.client.close()
  }

  /** Reading changes nothing, so it is done again while the server restarts, up to a limit. */
  private async retried<T>(read: () => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt++) {
      try {
        return await this.whileUp(read())
      } catch (error) {
        if (attempt >= maxReadAttempts || this.client.isClosed()) throw error
        await this.nextUp(readRetryMs)
      }
    }
  }

  /**
   * Fails at once when the connection is lost: an answer to what was sent before cannot come any
   * more.
   */
  private whileUp<T>(work: Promise<T>): Promise<T> {
    return new Promise((resolve, reject) => {
      const stop = this.onStatus((isUp) => {
        if (!isUp) reject(new Error('nats-server went away'))
      })
      work.then(resolve, reject).finally(stop)
    })
  }

  /** Resolves when the connection is back, or after `atMostMs`. */
  private async nextUp(atMostMs: number): Promise<void> {
    if (this.isUp) return delay(readRetryMs / 10)
    await new Promise<void>((resolve) => {
      const timer = setTimeout(done, atMostMs)
      const stop = this.onStatus(done)
      function done() {
        clearTimeout(timer)
        stop()
        resolve()
      }
    })
  }

  /** Ends with the connection. */
  private async followStatus(): Promise<void> {
    for await (const status of this.client.status()) {
      const isUp = status.type === 'reconnect'
      if (!isUp && status.type !== 'disconnect') continue
      this.isUp = isUp
      for (const listener of [...this.listeners]) listener(isUp)
    }
  }
}

function refusalOf(error: unknown): AppendResult {
  if (error instanceof NatsError && error.api_error !== undefined) {
    if (error.api_error.err_code === wrongLastSequence) return { outcome: 'conflict' }
    // 10077 and relatives: no space left in the store.
    if (/insufficient|maximum|space/i.test(error.api_error.description)) {
      throw new TunemeshError('DISK_FULL', `nats-server refuses to store: ${error.message}.`, {
        cause: error,
      })
    }
  }
  // Timed out, disconnected, no responder: it may or may not be stored.
  return { outcome: 'unknown', reason: error instanceof Error ? error.message : String(error) }
}

const isStreamMissing = (error: unknown) =>
  error instanceof NatsError && error.api_error?.err_code === 10059

const isMessageMissing = (error: unknown) =>
  error instanceof NatsError &&
  (error.api_error?.err_code === 10037 || error.code === NatsErrorCode.JetStream404NoMessages)
