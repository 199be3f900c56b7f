/**
 * What happened to each job, in order and without gaps: appended in batches, read from any
 * sequence.
 *
 * A batch is one message (a JSON array), and a job has one append under way at a time, so order and
 * numbering survive retries. Readers see an event only once it is stored: what they were shown is
 * never taken back by a crash.
 */
import { setTimeout as delay } from 'node:timers/promises'
import type { Logger } from 'pino'
import { TunemeshError } from '../proto/errors.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import { readSubject } from '../proto/nats-client.js'
import { eventStream, eventSubject } from '../proto/subjects.js'
import { fileStorage, type NatsConnection } from './nats-connection.js'

export type StoredEvent = JobEvent & { sequence: number; jobId: string; timeMs: number }
export type NewEvent = Omit<JobEvent, 'sequence' | 'jobId' | 'timeMs'>

/** Events of one job that wait for the store; beyond it log lines are dropped and counted. */
const maxWaiting = 4_096
const maxBatch = 512
/** A batch stays well below max_payload; one event is at most a few hundred kilobytes. */
const maxBatchBytes = 512 << 10
const maxEventBytes = 384 << 10
/** The newest events stay in memory for readers that are up to date. */
const numRecent = 512
const maxRetryDelayMs = 1_000
/** Within it the last events are stored, or the store is away for good. */
const closeGraceMs = 3_000

interface JobLog {
  /** Last sequence given out. */
  last: number
  /** Last sequence known to be stored. */
  stored: number
  /** Stream sequence of this subject's last message, for compare-and-set. */
  lastMessage: number
  waiting: { event: StoredEvent; bytes: number }[]
  recent: StoredEvent[]
  /** Where to start reading: [event sequence, stream sequence] of some batches, ascending. */
  index: [number, number][]
  wake: Set<() => void>
  appending: Promise<void> | null
  numDropped: number
}

export interface EventLogOptions {
  log: Logger
  nowMs: () => number
  /** Another coordinator has written to a job's events: this one must end. */
  onFenced: (error: TunemeshError) => void
}

export class EventLog {
  readonly #jobs = new Map<string, Promise<JobLog>>()
  #closed = false

  private constructor(
    private readonly connection: NatsConnection,
    private readonly options: EventLogOptions,
  ) {}

  static async open(connection: NatsConnection, options: EventLogOptions): Promise<EventLog> {
    await connection.ensureStream({
      name: eventStream,
      subjects: [eventSubject('*')],
      storage: fileStorage,
      allow_direct: true,
    })
    return new EventLog(connection, options)
  }

  /** Takes the event and returns; it is stored soon after, in this order. */
  append(jobId: string, event: NewEvent): void {
    const opened = this.#open(jobId)
    opened.then(
      (job) => this.#enqueue(jobId, job, event),
      (error) => this.options.log.error({ err: error, jobId }, 'an event was lost'),
    )
  }

  /** Resolves when all events appended so far are stored. */
  async flush(): Promise<void> {
    for (const opened of this.#jobs.values()) {
      const job = await opened
      while (job.appending !== null) await job.appending
    }
  }

  /**
   * The events of a job after a sequence, then those to come, until the signal fires.
   * A reader that stops reading costs nothing: it is served from the stream when it returns.
   */
  async *subscribe(
    jobId: string,
    afterSequence: number,
    signal: AbortSignal,
  ): AsyncGenerator<StoredEvent[]> {
    let cursor = afterSequence
    for (;;) {
      await this.waitFor(jobId, cursor, signal)
      if (signal.aborted || this.#closed) return
      const batch = await this.read(jobId, cursor, maxBatch)
      cursor = batch.at(-1)?.sequence ?? cursor
      if (batch.length > 0) yield batch
    }
  }

  /** Up to about `limit` stored events after a sequence. */
  async read(jobId: string, afterSequence: number, limit: number): Promise<StoredEvent[]> {
    const job = await this.#open(jobId)
    const events: StoredEvent[] = []
    for await (const batch of this.#readAfter(jobId, job, afterSequence)) {
      events.push(...batch)
      if (events.length >= limit) break
    }
    return events
  }

  /**
   * Resolves when something after the sequence is stored, at the signal, or when the log is closed.
   */
  async waitFor(jobId: string, afterSequence: number, signal: AbortSignal): Promise<void> {
    const job = await this.#open(jobId)
    while (job.stored <= afterSequence && !signal.aborted && !this.#closed) {
      await nextWake(job, signal)
    }
  }

  /** All stored events up to now. */
  readAll(jobId: string): Promise<StoredEvent[]> {
    return this.read(jobId, 0, Number.POSITIVE_INFINITY)
  }

  /** Is nothing behind this sequence, stored or on its way? */
  async isLast(jobId: string, sequence: number): Promise<boolean> {
    return (await this.#open(jobId)).last <= sequence
  }

  /** Waits so long for what is not stored yet; where the store is gone, that would be for ever. */
  async close(graceMs = closeGraceMs): Promise<void> {
    const waited = new AbortController()
    const { signal } = waited
    const isLate = delay(graceMs, true, { signal }).catch(() => true)
    const flushed = this.flush().then(() => false)
    try {
      if (await Promise.race([flushed, isLate])) {
        this.options.log.error(`events not stored within ${graceMs} ms are lost`)
      }
    } catch (error) {
      this.options.log.error({ err: error }, 'the last events are lost')
    } finally {
      waited.abort()
      this.#closed = true
      for (const opened of this.#jobs.values()) {
        void opened.then(wakeReaders, () => {})
      }
    }
  }

  async *#readAfter(jobId: string, job: JobLog, cursor: number): AsyncGenerator<StoredEvent[]> {
    const oldest = job.recent[0]?.sequence
    if (oldest !== undefined && cursor >= oldest - 1) {
      const fresh = job.recent.filter((event) => event.sequence > cursor)
      if (fresh.length > 0) yield fresh
      return
    }
    const fromSequence = startOf(job.index, cursor + 1)
    const query = { stream: eventStream, subject: eventSubject(jobId), fromSequence }
    for await (const message of readSubject(this.connection, query)) {
      const batch = decode(message.data).filter((event) => event.sequence > cursor)
      if (batch.length > 0) yield batch
    }
  }

  /** A failed opening is forgotten, so that the next event or reader tries again. */
  #open(jobId: string): Promise<JobLog> {
    const known = this.#jobs.get(jobId)
    if (known !== undefined) return known
    const opened = this.#load(jobId)
    this.#jobs.set(jobId, opened)
    opened.catch(() => this.#jobs.delete(jobId))
    return opened
  }

  async #load(jobId: string): Promise<JobLog> {
    const last = await this.connection.readLast(eventStream, eventSubject(jobId))
    const sequence = last === null ? 0 : (decode(last.data).at(-1)?.sequence ?? 0)
    return {
      last: sequence,
      stored: sequence,
      lastMessage: last?.sequence ?? 0,
      waiting: [],
      recent: [],
      index: [],
      wake: new Set(),
      appending: null,
      numDropped: 0,
    }
  }

  #enqueue(jobId: string, job: JobLog, event: NewEvent): void {
    if (job.waiting.length >= maxWaiting && event.log !== undefined) {
      job.numDropped++
      return
    }
    const timeMs = this.options.nowMs()
    let stored: StoredEvent = { ...event, sequence: job.last + 1, jobId, timeMs }
    let bytes = JSON.stringify(stored).length
    if (bytes > maxEventBytes) {
      const message = `An event of ${bytes} bytes was too long to keep.`
      stored = { sequence: job.last + 1, jobId, timeMs, log: { level: 'warn', message } }
      bytes = 200
    }
    job.last = stored.sequence
    job.waiting.push({ event: stored, bytes })
    job.appending ??= this.#appendWaiting(jobId, job).finally(() => {
      job.appending = null
    })
  }

  async #appendWaiting(jobId: string, job: JobLog): Promise<void> {
    while (job.waiting.length > 0 && !this.#closed) {
      const batch = nextBatch(job.waiting)
      const appended = await this.#appendBatch(jobId, job, batch)
      if (!appended) return
      job.waiting.splice(0, batch.length)
      job.stored = batch.at(-1)?.sequence ?? job.stored
      job.recent.push(...batch)
      job.recent.splice(0, job.recent.length - numRecent)
      wakeReaders(job)
      if (job.numDropped > 0) {
        const message = `${job.numDropped} log lines were dropped while the store was away.`
        job.numDropped = 0
        this.#enqueue(jobId, job, { log: { level: 'warn', message } })
      }
    }
  }

  /** Retries until the store has the batch; false: closed or fenced. */
  async #appendBatch(jobId: string, job: JobLog, batch: StoredEvent[]): Promise<boolean> {
    const data = new TextEncoder().encode(JSON.stringify(batch))
    const subject = eventSubject(jobId)
    for (let attempt = 0; !this.#closed; attempt++) {
      const result = await this.#tryAppend(subject, data, job.lastMessage)
      let sequence = result.outcome === 'ok' ? result.sequence : null
      if (result.outcome === 'conflict') {
        // Ours from an attempt whose answer was lost, or another coordinator's.
        const last = await this.connection.readLast(eventStream, subject).catch(() => null)
        if (last === null) continue
        if (!sameBytes(last.data, data)) {
          this.options.onFenced(fenced(jobId))
          return false
        }
        sequence = last.sequence
      }
      if (sequence !== null) {
        job.lastMessage = sequence
        job.index.push([batch[0]?.sequence ?? 0, sequence])
        thinOut(job.index)
        return true
      }
      await delay(Math.min(50 * 2 ** attempt, maxRetryDelayMs), undefined, { ref: false })
    }
    return false
  }

  async #tryAppend(subject: string, data: Uint8Array, expectedLast: number) {
    try {
      return await this.connection.append(subject, data, expectedLast)
    } catch (error) {
      this.options.log.warn({ err: error }, 'events cannot be stored, trying again')
      return { outcome: 'unknown' as const }
    }
  }
}

function wakeReaders(job: JobLog): void {
  for (const wake of job.wake) wake()
}

function nextBatch(waiting: JobLog['waiting']): StoredEvent[] {
  const batch: StoredEvent[] = []
  let bytes = 0
  for (const item of waiting) {
    bytes += item.bytes
    if (batch.length > 0 && (batch.length >= maxBatch || bytes > maxBatchBytes)) break
    batch.push(item.event)
  }
  return batch
}

/** The stream sequence of the last indexed batch that begins at or before an event. */
function startOf(index: [number, number][], eventSequence: number): number {
  for (let i = index.length - 1; i >= 0; i--) {
    const [first, streamSequence] = index[i] ?? [0, 1]
    if (first <= eventSequence) return streamSequence
  }
  return 1
}

/** At most 1,024 entries: every other one goes when it is full. */
function thinOut(index: [number, number][]): void {
  if (index.length <= 1_024) return
  const kept = index.filter((_, i) => i % 2 === 0)
  index.splice(0, index.length, ...kept)
}

/** Resolves at the job's next stored batch or at the signal. */
function nextWake(job: JobLog, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const wake = () => {
      job.wake.delete(wake)
      signal.removeEventListener('abort', wake)
      resolve()
    }
    job.wake.add(wake)
    signal.addEventListener('abort', wake)
  })
}

const decode = (data: Uint8Array) => JSON.parse(new TextDecoder().decode(data)) as StoredEvent[]

const sameBytes = (a: Uint8Array, b: Uint8Array) => Buffer.compare(a, b) === 0

const fenced = (jobId: string) =>
  new TunemeshError(
    'STATE_CONFLICT',
    `Another coordinator has written events of job ${jobId}; this one gives way.`,
  )
