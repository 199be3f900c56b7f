/**
 * Every job this mesh has had: in memory, and each change first in a JetStream stream, one subject
 * a job.
 */
import { randomBytes } from 'node:crypto'
import { setTimeout as delay } from 'node:timers/promises'
import { TunemeshError } from '../proto/errors.js'
import type { Artifact } from '../proto/gen/tunemesh/v1/Artifact.js'
import type { Job } from '../proto/gen/tunemesh/v1/Job.js'
import { type JobId, jobId } from '../proto/ids.js'
import { readSubject } from '../proto/nats-client.js'
import { jobStream, jobSubject } from '../proto/subjects.js'
import type { Precision } from '../proto/train-spec.js'
import { fileStorage, type NatsConnection } from './nats-connection.js'

export type JobState =
  | 'VALIDATING'
  | 'QUEUED'
  | 'RUNNING'
  | 'PAUSED'
  | 'STOPPING'
  | 'STOPPED'
  | 'SUCCEEDED'
  | 'FAILED'

interface StoredError {
  code: string
  message: string
  details: string[]
}

/** A job as it is stored; the fields of the API's Job and what only the coordinator needs. */
export interface JobRecord {
  jobId: JobId
  name: string
  state: JobState
  createdAtMs: number
  startedAtMs: number
  endedAtMs: number
  error: StoredError | null
  jobFile: string
  jobFileName: string
  baseDir: string
  overrides: string[]
  goldenJson: string
  specJson: string
  outputDir: string
  step: number
  numSteps: number
  lastLoss: number
  adapterDigest: string
  artifacts: Artifact[]
  weightsSha256: string
  idempotencyKey: string
  /** Blob of the prepared job (coordinator/prepared-blob.ts); empty before ingest has ended. */
  preparedDigest: string
  /** What `bf16: auto` came to when the job was first planned; absent or empty before. */
  precision?: Precision | ''
  /** Order in the queue; a resumed job goes to its end. */
  queuedAtMs: number
}

/** States in which nothing more happens by itself. */
export const endStates: readonly JobState[] = ['STOPPED', 'SUCCEEDED', 'FAILED']
export const hasEnded = (job: JobRecord) => endStates.includes(job.state)

/** A lost answer is settled by reading; after this many turns the call fails and says so. */
const maxAppendTurns = 8

export class JobStore {
  readonly #jobs = new Map<JobId, { record: JobRecord; sequence: number }>()
  /** One change of a job at a time: each builds on the stored one before. */
  readonly #writes = new Map<JobId, Promise<unknown>>()

  private constructor(private readonly connection: NatsConnection) {}

  static async open(connection: NatsConnection): Promise<JobStore> {
    await connection.ensureStream({
      name: jobStream,
      subjects: [jobSubject('*')],
      storage: fileStorage,
      max_msgs_per_subject: 1,
      allow_direct: true,
    })
    const store = new JobStore(connection)
    const query = { stream: jobStream, subject: jobSubject('*'), fromSequence: 1 }
    for await (const message of readSubject(connection, query)) {
      const record = JSON.parse(new TextDecoder().decode(message.data)) as JobRecord
      store.#jobs.set(record.jobId, { record, sequence: message.sequence })
    }
    return store
  }

  get(id: string): JobRecord {
    const job = this.#jobs.get(jobId(id))
    if (job !== undefined) return job.record
    throw new TunemeshError(
      'JOB_NOT_FOUND',
      `There is no job ${JSON.stringify(id.slice(0, 80))}. \`tunemesh jobs\` lists the jobs.`,
    )
  }

  /** Newest first. */
  list(): JobRecord[] {
    return [...this.#jobs.values()]
      .map((job) => job.record)
      .sort((a, b) => b.createdAtMs - a.createdAtMs || b.jobId.localeCompare(a.jobId))
  }

  findByKey(idempotencyKey: string): JobRecord | null {
    if (idempotencyKey === '') return null
    return this.list().find((job) => job.idempotencyKey === idempotencyKey) ?? null
  }

  /** Stores a new job; only then does it exist. */
  async create(record: JobRecord): Promise<JobRecord> {
    return this.#write(record.jobId, () => record)
  }

  /**
   * Stores a change before anyone sees it.
   * @param change the new fields, given the job as it is now; null: leave it
   */
  update(id: JobId, change: (now: JobRecord) => Partial<JobRecord> | null): Promise<JobRecord> {
    return this.#write(id, () => {
      const now = this.get(id)
      const changed = change(now)
      return changed === null ? null : { ...now, ...changed }
    })
  }

  /**
   * What is shown at once and stored with the next change of state: progress, which the commit log
   * proves anyway, and a pause, which the next coordinator would find out anew.
   */
  note(id: JobId, progress: Partial<Omit<JobRecord, 'jobId'>>): void {
    const job = this.#jobs.get(id)
    if (job !== undefined) job.record = { ...job.record, ...progress }
  }

  #write(id: JobId, next: () => JobRecord | null): Promise<JobRecord> {
    const before = this.#writes.get(id) ?? Promise.resolve()
    const written = before.then(async () => {
      const record = next()
      if (record === null) return this.get(id)
      const sequence = await this.#append(record, this.#jobs.get(id)?.sequence ?? 0)
      this.#jobs.set(id, { record, sequence })
      return record
    })
    const settled = written.catch(() => {})
    this.#writes.set(id, settled)
    void settled.then(() => {
      if (this.#writes.get(id) === settled) this.#writes.delete(id)
    })
    return written
  }

  async #append(record: JobRecord, expectedLast: number): Promise<number> {
    const subject = jobSubject(record.jobId)
    const data = new TextEncoder().encode(JSON.stringify(record))
    for (let turn = 0; turn < maxAppendTurns; turn++) {
      const result = await this.connection.append(subject, data, expectedLast)
      if (result.outcome === 'ok') return result.sequence
      if (result.outcome === 'conflict') {
        const last = await this.connection.readLast(jobStream, subject)
        // Ours, from a turn whose answer was lost.
        if (last !== null && Buffer.compare(last.data, data) === 0) return last.sequence
        throw new TunemeshError(
          'STATE_CONFLICT',
          `Another coordinator has changed job ${record.jobId}; this one gives way.`,
        )
      }
      await delay(100 * (turn + 1))
    }
    throw new TunemeshError(
      'NATS_UNREACHABLE',
      `The state of job ${record.jobId} could not be stored: nats-server did not answer. ` +
        'It is being restarted; try again.',
    )
  }
}

/** Not user text, safe in subjects and paths. */
export function newJobId(): JobId {
  const alphabet = 'abcdefghijkmnpqrstuvwxyz23456789'
  const letters = [...randomBytes(8)].map((byte) => alphabet[byte % 32]).join('')
  return jobId(`job-${letters}`)
}

export const jobMessage = (record: JobRecord): Job => ({
  jobId: record.jobId,
  name: record.name,
  state: record.state,
  createdAtMs: record.createdAtMs,
  startedAtMs: record.startedAtMs,
  endedAtMs: record.endedAtMs,
  error: record.error,
  jobFile: record.jobFile,
  specJson: record.specJson,
  outputDir: record.outputDir,
  step: record.step,
  numSteps: record.numSteps,
  lastLoss: record.lastLoss,
  adapterDigest: record.adapterDigest,
  artifacts: record.artifacts,
  weightsSha256: record.weightsSha256,
  precision: record.precision ?? '',
})
