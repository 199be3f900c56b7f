import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { pino } from 'pino'
import type { BlobStore } from '../../coordinator/blob-store.js'
import type { EventLog } from '../../coordinator/event-log.js'
import { JobQueue, type RunningJob } from '../../coordinator/job-queue.js'
import type { JobRecord, JobState, JobStore } from '../../coordinator/job-store.js'
import { jobId } from '../../proto/ids.js'

type Outcome = Awaited<RunningJob['outcome']>

/** One job in a store whose writes end when the test says so, in the order they were asked. */
class OneJob {
  readonly id = jobId('job-aaaaaaaa')
  readonly told: string[] = []
  readonly asked: boolean[] = []
  readonly queue: JobQueue
  /** Whether each run was told to begin. */
  readonly begun: Promise<boolean>[] = []
  end: (outcome: Outcome) => void = () => {}
  record: JobRecord
  #writes: Promise<unknown> = Promise.resolve()

  constructor(state: JobState, settings: { isHeld?: boolean; outputDir?: string } = {}) {
    const { isHeld = false, outputDir = '/nowhere' } = settings
    const preparedDigest = 'sha256:00'
    this.record = { jobId: this.id, state, outputDir, preparedDigest, queuedAtMs: 1 } as JobRecord
    const store = {
      get: () => this.record,
      list: () => [this.record],
      findByKey: () => null,
      create: (created: JobRecord) => this.#writes.then(() => created),
      update: (_id: string, change: (now: JobRecord) => Partial<JobRecord> | null) => {
        const written = this.#writes.then(() => {
          this.record = { ...this.record, ...change(this.record) }
          return this.record
        })
        this.#writes = written
        return written
      },
    }
    const append = (_id: string, event: { stateChanged?: { state: string } }) =>
      this.told.push(event.stateChanged?.state ?? '')
    this.queue = new JobQueue({
      store: store as unknown as JobStore,
      events: { append } as unknown as EventLog,
      blobs: {} as BlobStore,
      ingest: () => Promise.reject(new Error('not asked for')),
      admit: () => {},
      run: (_job, told) => this.#run(told),
      isHeld,
      nowMs: () => 1,
      log: pino({ level: 'silent' }),
    })
  }

  /** Every change asked for so far, and what follows from it, has been made. */
  async settled(): Promise<void> {
    for (let turn = 0; turn < 20; turn++) await new Promise((done) => setImmediate(done))
  }

  #run(told: Promise<unknown>): RunningJob {
    const ended = new Promise<Outcome>((resolve) => {
      this.end = resolve
    })
    this.begun.push(
      told.then(
        () => true,
        () => false,
      ),
    )
    return {
      outcome: told.then(() => ended),
      stop: (now) => this.asked.push(now),
      resume: () => {},
    }
  }
}

const aRequest = {
  jobFile: '',
  jobFileName: 'job.yaml',
  baseDir: '/',
  overrides: [],
  goldenJson: '',
  idempotencyKey: '',
}

describe('the queue of jobs', () => {
  it('a stop asked at any moment of the end of a job leaves it as it ended', async () => {
    for (let turns = 0; turns < 16; turns++) {
      const job = new OneJob('QUEUED')
      await job.queue.recover()
      await job.settled()
      job.end({ state: 'SUCCEEDED' })
      for (let turn = 0; turn < turns; turn++) await null
      await job.queue.stop(job.id, false)
      await job.settled()
      assert.equal(job.record.state, 'SUCCEEDED')
      assert.equal(job.told.at(-1), 'SUCCEEDED')
    }
  })

  it('a job stopped while it lay in the queue does not begin', async () => {
    const job = new OneJob('QUEUED')
    const stopped = job.queue.stop(job.id, false)
    await job.queue.recover()
    assert.equal((await stopped).state, 'STOPPED')
    await job.settled()
    assert.equal(job.record.state, 'STOPPED')
    assert.deepEqual(await Promise.all(job.begun), [false])
    assert.deepEqual(job.told, ['STOPPED'])
  })

  it('a job stopped while it lay in the queue begins once it is resumed', async () => {
    const job = new OneJob('QUEUED')
    const stopped = job.queue.stop(job.id, false)
    await job.queue.recover()
    await stopped
    await job.queue.resume(job.id)
    await job.settled()
    assert.deepEqual(await Promise.all(job.begun), [false, true])
    assert.deepEqual(job.told, ['STOPPED', 'QUEUED', 'RUNNING'])
  })

  it('a stop of a running job is told, asked of the run, and ends with its outcome', async () => {
    const job = new OneJob('QUEUED')
    await job.queue.recover()
    assert.equal((await job.queue.stop(job.id, true)).state, 'STOPPING')
    assert.deepEqual(job.asked, [true])
    job.end({ state: 'STOPPED' })
    await job.settled()
    assert.deepEqual(job.told, ['RUNNING', 'STOPPING', 'STOPPED'])
  })

  it('a held coordinator refuses to queue a job and says what holds the folder', async () => {
    const job = new OneJob('STOPPED', { isHeld: true })
    const refusal = { code: 'STATE_CONFLICT', message: /tunemesh chat/ }
    await assert.rejects(job.queue.resume(job.id), refusal)
    await assert.rejects(job.queue.submit(aRequest), refusal)
    assert.deepEqual(job.told, [])
  })

  it('of two jobs submitted at once with one output folder the second is refused', async () => {
    const job = new OneJob('STOPPED')
    const request = { ...aRequest, goldenJson: '{"outputDir":"/nowhere/twice"}' }
    const first = job.queue.submit(request)
    const refused = assert.rejects(job.queue.submit(request), (error: Error) => {
      assert.match(error.message, /belongs to job job-\w{8}, which is VALIDATING/)
      return (error as { code?: string }).code === 'OUTPUT_IN_USE'
    })
    assert.equal((await first).outputDir, '/nowhere/twice')
    await refused
  })

  it('a job that is about to be queued again holds its output folder', async () => {
    const job = new OneJob('STOPPED', { outputDir: '/nowhere/twice' })
    const resumed = job.queue.resume(job.id)
    const request = { ...aRequest, goldenJson: '{"outputDir":"/nowhere/twice"}' }
    const refusal = { code: 'OUTPUT_IN_USE', message: new RegExp(job.id) }
    await assert.rejects(job.queue.submit(request), refusal)
    assert.equal((await resumed).state, 'QUEUED')
  })

  it('a job whose output folder was filled meanwhile is not resumed', async (test) => {
    const folder = mkdtempSync(join(tmpdir(), 'tunemesh-queue-'))
    test.after(() => rmSync(folder, { recursive: true }))
    const job = new OneJob('STOPPED', { outputDir: folder })
    writeFileSync(join(folder, 'run.json'), '{"jobId":"job-bbbbbbbb"}')
    await assert.rejects(job.queue.resume(job.id), { code: 'OUTPUT_IN_USE' })
    assert.equal(job.record.state, 'STOPPED')
    writeFileSync(join(folder, 'run.json'), JSON.stringify({ jobId: job.id }))
    assert.equal((await job.queue.resume(job.id)).state, 'QUEUED')
  })
})
