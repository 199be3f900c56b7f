/**
 * The life of every job: validated, queued, run one at a time, delivered. Each change of state is
 * stored first, then told.
 */
import { resolve } from 'node:path'
import type { Logger } from 'pino'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { SubmitRequest__Output } from '../proto/gen/tunemesh/v1/SubmitRequest.js'
import type { JobId } from '../proto/ids.js'
import { keyPlaces, readJobFile } from '../proto/job-file.js'
import type { JobSpec } from '../proto/job-spec.js'
import type { BlobStore } from './blob-store.js'
import type { EventLog } from './event-log.js'
import { hasEnded, type JobRecord, type JobState, type JobStore, newJobId } from './job-store.js'
import { assertOutputFree } from './output-folder.js'
import { storePrepared } from './prepared-blob.js'
import type { PreparedJob } from './prepared-job.js'

/** Reads rows and model, tokenises and packs; everything before a device is taken. */
type Ingest = (job: JobRecord, signal: AbortSignal) => Promise<PreparedJob>

/** One run under way. `stop` and `resume` are asked, not done, when they return. */
export interface RunningJob {
  outcome: Promise<Partial<JobRecord> & { state: JobState }>
  stop(now: boolean): void
  resume(): void
}

export interface JobQueueOptions {
  store: JobStore
  events: EventLog
  blobs: BlobStore
  ingest: Ingest
  /**
   * Refuses what no worker here could run, before anything is stored or read.
   * @throws TunemeshError
   */
  admit: (spec: JobSpec, keyPlaces: ReadonlyMap<string, string>) => void
  /** `told` resolves when the job's new state is stored; the run begins then. */
  run: (job: JobRecord, told: Promise<unknown>) => RunningJob
  /** Queued jobs wait until the coordinator is started without this. */
  isHeld: boolean
  nowMs: () => number
  log: Logger
}

export class JobQueue {
  readonly #submits = new Map<string, Promise<JobRecord>>()
  readonly #ingests = new Map<JobId, AbortController>()
  /** Jobs as they will be once stored: their output folders are taken already. */
  readonly #entering = new Set<JobRecord>()
  #running: { id: JobId; job: RunningJob; ended: Promise<void> } | null = null
  #isClosing = false

  constructor(private readonly options: JobQueueOptions) {}

  /**
   * Goes on with what an earlier coordinator left: a run under way first, then ingests, then the
   * queue.
   */
  async recover(): Promise<void> {
    if (this.options.isHeld) return
    const { store } = this.options
    for (const job of store.list().filter((job) => !hasEnded(job))) {
      if (job.state === 'VALIDATING') this.#startIngest(job)
      else if (job.state !== 'QUEUED' && job.state !== 'STOPPING') {
        await store.update(job.jobId, (now) =>
          hasEnded(now) ? null : { state: 'QUEUED', queuedAtMs: 0 },
        )
      } else if (job.state === 'STOPPING') {
        const stopped = { state: 'STOPPED' as const, endedAtMs: this.options.nowMs() }
        await this.#enter(job.jobId, stopped, hasNotEnded)
      }
    }
    this.#pump()
  }

  /**
   * @throws TunemeshError JOB_INVALID with every problem of the job file; OUTPUT_IN_USE;
   *   STATE_CONFLICT when this coordinator runs no jobs
   */
  async submit(request: SubmitRequest__Output): Promise<JobRecord> {
    const key = request.idempotencyKey
    const known = this.options.store.findByKey(key)
    if (known !== null) return known
    const underWay = key === '' ? undefined : this.#submits.get(key)
    if (underWay !== undefined) return underWay
    this.#assertOpen()
    const submitted = this.#create(request)
    if (key !== '') this.#submits.set(key, submitted)
    try {
      return await submitted
    } finally {
      this.#submits.delete(key)
    }
  }

  /** Checkpoints and stops; idempotent. */
  async stop(id: string, now: boolean): Promise<JobRecord> {
    const job = this.options.store.get(id)
    if (hasEnded(job)) return job
    this.#ingests.get(job.jobId)?.abort()
    if (this.#running?.id === job.jobId) {
      const { job: running } = this.#running
      const stopping = await this.#enter(job.jobId, { state: 'STOPPING' }, hasNotEnded)
      if (stopping !== null) running.stop(now)
      return stopping ?? this.options.store.get(id)
    }
    const stopped = { state: 'STOPPED' as const, endedAtMs: this.options.nowMs() }
    return (await this.#enter(job.jobId, stopped, hasNotEnded)) ?? this.options.store.get(id)
  }

  /** Queues a stopped or failed job again; a paused one goes on at once; others are left alone. */
  async resume(id: string): Promise<JobRecord> {
    const job = this.options.store.get(id)
    if (this.#running?.id === job.jobId) this.#running.job.resume()
    if (job.state === 'SUCCEEDED') {
      throw new TunemeshError(
        'STATE_CONFLICT',
        `Job ${id} has succeeded; there is nothing to resume. Its result is in ${job.outputDir}.`,
      )
    }
    if (!canResume(job)) return job
    this.#assertOpen()
    const others = this.#jobsToCome().filter((other) => other.jobId !== job.jobId)
    assertOutputFree(job.outputDir, others, job.jobId)
    const queueing: JobRecord = { ...job, state: 'QUEUED' }
    this.#entering.add(queueing)
    try {
      return await this.#queueAgain(job)
    } finally {
      this.#entering.delete(queueing)
    }
  }

  async #queueAgain(job: JobRecord): Promise<JobRecord> {
    const cleared = { error: null, endedAtMs: 0, queuedAtMs: this.options.nowMs() }
    if (job.preparedDigest === '') {
      const change = { ...cleared, state: 'VALIDATING' as const }
      const validating = await this.#enter(job.jobId, change, canResume)
      if (validating !== null) this.#startIngest(validating)
      return validating ?? this.options.store.get(job.jobId)
    }
    const queued = await this.#enter(job.jobId, { ...cleared, state: 'QUEUED' }, canResume)
    this.#pump()
    return queued ?? this.options.store.get(job.jobId)
  }

  /** A change of state that a run itself tells: paused, and going on again. */
  async noteRunState(id: JobId, change: Partial<JobRecord> & { state: JobState }): Promise<void> {
    const { store } = this.options
    const isOver = (now: JobRecord) => now.state === 'STOPPING' || hasEnded(now)
    // Whoever is told of it and asks at once must see it.
    if (!isOver(store.get(id))) store.note(id, change)
    await store.update(id, (now) => (isOver(now) ? null : change))
  }

  /** Stops what runs with a checkpoint; resolves when it has ended or after `graceMs`. */
  async close(graceMs: number): Promise<void> {
    this.#isClosing = true
    for (const ingest of this.#ingests.values()) ingest.abort()
    const running = this.#running
    if (running === null) return
    running.job.stop(false)
    let timer: NodeJS.Timeout | undefined
    const tooLate = new Promise<void>((done) => {
      timer = setTimeout(done, graceMs)
    })
    await Promise.race([running.ended, tooLate])
    clearTimeout(timer)
  }

  /** A job that nobody would run is refused rather than left to wait. */
  #assertOpen(): void {
    if (this.options.isHeld) {
      throw new TunemeshError(
        'STATE_CONFLICT',
        'This coordinator was started with --hold and runs no jobs: a command that only looks or ' +
          'asks, such as `tunemesh chat` or `tunemesh plan`, holds the state folder. ' +
          'End it, then try again.',
      )
    }
    if (!this.#isClosing) return
    const text = 'This coordinator is ending and takes no more jobs. Try again in a moment.'
    throw new TunemeshError('STATE_CONFLICT', text)
  }

  async #create(request: SubmitRequest__Output): Promise<JobRecord> {
    const { store, nowMs } = this.options
    const golden = request.goldenJson === '' ? null : goldenOf(request.goldenJson)
    const spec = golden === null ? readJobFile(fileOf(request)) : null
    if (spec !== null) this.options.admit(spec, keyPlaces(fileOf(request)))
    const outputDir = resolve(request.baseDir || '/', spec?.output_dir ?? golden?.outputDir ?? '')
    assertOutputFree(outputDir, this.#jobsToCome())
    const createdAtMs = nowMs()
    const job: JobRecord = {
      jobId: newJobId(),
      name: spec?.name ?? 'golden',
      state: 'VALIDATING',
      createdAtMs,
      startedAtMs: 0,
      endedAtMs: 0,
      error: null,
      jobFile: request.jobFile,
      jobFileName: request.jobFileName || 'job.yaml',
      baseDir: request.baseDir,
      overrides: request.overrides,
      goldenJson: request.goldenJson,
      specJson: spec === null ? '' : JSON.stringify(spec),
      outputDir,
      step: 0,
      numSteps: 0,
      lastLoss: 0,
      adapterDigest: '',
      artifacts: [],
      weightsSha256: '',
      idempotencyKey: request.idempotencyKey,
      preparedDigest: '',
      queuedAtMs: createdAtMs,
    }
    this.#entering.add(job)
    try {
      const created = await store.create(job)
      this.#tell(created)
      this.#startIngest(created)
      return created
    } finally {
      this.#entering.delete(job)
    }
  }

  #jobsToCome(): JobRecord[] {
    return [...this.options.store.list(), ...this.#entering]
  }

  #startIngest(job: JobRecord): void {
    const stop = new AbortController()
    this.#ingests.set(job.jobId, stop)
    this.#prepare(job, stop.signal)
      .catch((error) => this.#failIngest(job, stop.signal, error))
      .catch((error) => this.options.log.error({ err: error }, 'a job could not be stored'))
      .finally(() => {
        if (this.#ingests.get(job.jobId) === stop) this.#ingests.delete(job.jobId)
      })
  }

  async #prepare(job: JobRecord, signal: AbortSignal): Promise<void> {
    const { ingest, blobs, events } = this.options
    const prepared = await ingest(job, signal)
    events.append(job.jobId, { preflight: prepared.report })
    const preparedDigest = await storePrepared(blobs, prepared)
    const queued = {
      state: 'QUEUED' as const,
      preparedDigest,
      specJson: JSON.stringify(prepared.spec),
      numSteps: prepared.schedule.numSteps,
    }
    await this.#enter(job.jobId, queued, (now) => !signal.aborted && now.state === 'VALIDATING')
    this.#pump()
  }

  async #failIngest(job: JobRecord, signal: AbortSignal, error: unknown): Promise<void> {
    // Stopped, or the coordinator ends: the next one ingests it anew.
    const isWaited = (now: JobRecord) => !signal.aborted && now.state === 'VALIDATING'
    await this.#enter(job.jobId, this.#failure(error), isWaited)
  }

  #pump(): void {
    const { store, isHeld } = this.options
    if (this.#running !== null || this.#isClosing || isHeld) return
    const next = store
      .list()
      .filter((job) => job.state === 'QUEUED')
      .sort((a, b) => a.queuedAtMs - b.queuedAtMs)[0]
    if (next !== undefined) this.#start(next)
  }

  #start(queued: JobRecord): void {
    const { nowMs, log } = this.options
    const startedAtMs = nowMs()
    const isQueued = (now: JobRecord) => now.state === 'QUEUED'
    const entered = this.#enter(queued.jobId, { state: 'RUNNING', startedAtMs }, isQueued)
    const told = entered.then((running) => {
      if (running === null) throw stoppedBefore(queued.jobId)
    })
    const job = this.options.run({ ...queued, startedAtMs }, told)
    const end = async (outcome: Partial<JobRecord> & { state: JobState }) => {
      // Stopped while it still lay in the queue: this run has no say, the job may be queued again.
      if ((await entered.catch(() => queued)) === null) return
      await this.#enter(queued.jobId, { endedAtMs: nowMs(), ...outcome }, hasNotEnded)
    }
    const ended = job.outcome
      .catch((error) => this.#failure(error))
      .then(end)
      .catch((error) => log.error({ err: error }, 'an outcome was lost'))
      .finally(() => {
        this.#running = null
        this.#pump()
      })
    this.#running = { id: queued.jobId, job, ended }
  }

  /**
   * Stores a change of state and tells it, unless the job as it is by then does not allow it.
   * @returns null where it did not
   */
  async #enter(
    id: JobId,
    change: Partial<JobRecord> & { state: JobState },
    isAllowed: (now: JobRecord) => boolean,
  ): Promise<JobRecord | null> {
    let isEntered = false
    const job = await this.options.store.update(id, (now) => {
      isEntered = isAllowed(now)
      return isEntered ? change : null
    })
    if (!isEntered) return null
    this.#tell(job)
    return job
  }

  #tell(job: JobRecord): void {
    this.options.events.append(job.jobId, {
      stateChanged: { state: job.state, error: job.error },
    })
  }

  #failure(error: unknown): Partial<JobRecord> & { state: JobState } {
    if (!(error instanceof TunemeshError)) this.options.log.error({ err: error }, 'a job failed')
    const { code, message, details } = storedErrorOf(error)
    return { state: 'FAILED', error: { code, message, details }, endedAtMs: this.options.nowMs() }
  }
}

const hasNotEnded = (job: JobRecord) => !hasEnded(job)
const canResume = (job: JobRecord) => job.state === 'STOPPED' || job.state === 'FAILED'

const stoppedBefore = (id: JobId) =>
  new TunemeshError('JOB_STOPPED', `Job ${id} was stopped before it began.`)

function storedErrorOf(error: unknown) {
  const { code, message, details } = error as Partial<TunemeshError>
  if (isErrorCode(code)) return { code, message: message ?? '', details: details ?? [] }
  const text = 'The coordinator failed unexpectedly; its log has the cause.'
  return { code: 'INTERNAL' as const, message: text, details: [] }
}

const fileOf = (request: SubmitRequest__Output) => ({
  text: request.jobFile,
  fileName: request.jobFileName || 'job.yaml',
  overrides: request.overrides,
})

function goldenOf(text: string): { outputDir?: string } {
  try {
    return JSON.parse(text) as { outputDir?: string }
  } catch (cause) {
    throw new TunemeshError('JOB_INVALID', 'golden_json is not JSON.', { cause })
  }
}
