/**
 * One websocket: jobs, fleet, and the events of the job that its page shows.
 *
 * Each client is served at its own pace from the event log: a slow one falls behind and catches up,
 * one that reads nothing for long is closed. Nothing is queued for it beyond `maxBufferedBytes`.
 */
import { setTimeout as delay } from 'node:timers/promises'
import type { Logger } from 'pino'
import type { WebSocket } from 'ws'
import type { FromCoordinator, Subscribe } from '../proto/live-feed.js'
import type { EventLog } from './event-log.js'
import type { Fleet } from './fleet.js'
import { type JobStore, jobMessage } from './job-store.js'

/** Ten messages a second: frames are what costs, not bytes (docs: measured 12 times less CPU). */
const batchMs = 100
const pingMs = 1_000
const maxBufferedBytes = 1 << 20
const maxEventsAtOnce = 2_000
/** A client that has taken nothing for so long is closed; it may come back. */
const stuckMs = 30_000
const numListedJobs = 100

export interface FeedSources {
  store: JobStore
  events: EventLog
  fleet: Fleet
  nowMs: () => number
}

export function serveLiveFeed(client: WebSocket, sources: FeedSources, log: Logger): void {
  const feed = new LiveFeed(client, sources)
  client.on('message', (data) => feed.receive(String(data)))
  client.on('error', (error) => log.debug({ err: error }, 'a page was lost'))
  client.on('close', () => feed.close())
}

class LiveFeed {
  readonly #closed = new AbortController()
  #subscription: AbortController | null = null
  readonly #timer: NodeJS.Timeout
  /** As last sent: what has not changed is not sent again. */
  #lastJobs = ''
  #lastFleet = ''
  #fullSinceMs: number | null = null

  constructor(
    private readonly client: WebSocket,
    private readonly sources: FeedSources,
  ) {
    this.#timer = setInterval(() => this.#tick(), pingMs)
    this.#tick()
  }

  receive(text: string): void {
    const message = parseSubscribe(text)
    if (message === null || !this.#hasJob(message.jobId)) return
    this.#subscription?.abort()
    const subscription = new AbortController()
    this.#subscription = subscription
    const signal = AbortSignal.any([subscription.signal, this.#closed.signal])
    this.#follow(message, signal).catch(() => this.client.close(1011, 'events cannot be read'))
  }

  close(): void {
    clearInterval(this.#timer)
    this.#closed.abort()
  }

  async #follow({ jobId, afterSequence }: Subscribe, signal: AbortSignal): Promise<void> {
    const { events } = this.sources
    let cursor = afterSequence
    while (!signal.aborted) {
      await events.waitFor(jobId, cursor, signal)
      if (signal.aborted) return
      if (!this.#isFull()) {
        const batch = await events.read(jobId, cursor, maxEventsAtOnce)
        cursor = batch.at(-1)?.sequence ?? cursor
        if (batch.length > 0 && !signal.aborted) {
          this.#send({ type: 'events', jobId, events: batch })
        }
      }
      // What comes meanwhile makes the next batch.
      await delay(batchMs, undefined, { signal }).catch(() => {})
    }
  }

  #tick(): void {
    if (this.#isFull()) {
      this.#fullSinceMs ??= this.sources.nowMs()
      if (this.sources.nowMs() - this.#fullSinceMs > stuckMs) this.client.terminate()
      return
    }
    this.#fullSinceMs = null
    const serverTimeMs = this.sources.nowMs()
    const jobs = this.sources.store.list().slice(0, numListedJobs).map(listed)
    const jobsText = JSON.stringify(
      jobs.map(({ jobId, state, specJson }) => [jobId, state, specJson]),
    )
    if (jobsText === this.#lastJobs) this.#send({ type: 'ping', serverTimeMs })
    else this.#send({ type: 'hello', jobs, serverTimeMs })
    this.#lastJobs = jobsText
    const workers = this.sources.fleet.list()
    const fleetText = JSON.stringify(workers)
    if (fleetText !== this.#lastFleet) this.#send({ type: 'fleet', workers })
    this.#lastFleet = fleetText
  }

  #isFull(): boolean {
    return this.client.bufferedAmount > maxBufferedBytes
  }

  #hasJob(jobId: string): boolean {
    return this.sources.store.list().some((job) => job.jobId === jobId)
  }

  #send(message: FromCoordinator): void {
    if (this.client.readyState === this.client.OPEN) this.client.send(JSON.stringify(message))
  }
}

/** Without the job file's text, which only Get needs; the page shows settings from `specJson`. */
const listed = (record: Parameters<typeof jobMessage>[0]) => ({
  ...jobMessage(record),
  jobId: record.jobId as string,
  jobFile: '',
})

function parseSubscribe(text: string): Subscribe | null {
  try {
    const { type, jobId, afterSequence } = JSON.parse(text) as Partial<Subscribe>
    const isValid =
      type === 'subscribe' && typeof jobId === 'string' && Number.isSafeInteger(afterSequence)
    return isValid ? { type, jobId, afterSequence: Math.max(0, Number(afterSequence)) } : null
  } catch {
    return null // not from our page
  }
}
