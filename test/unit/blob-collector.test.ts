import assert from 'node:assert/strict'
import { existsSync, mkdtempSync, rmSync, utimesSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, test } from 'node:test'
import pino from 'pino'
import { BlobCollector, unnamedLifeMs } from '../../coordinator/blob-collector.js'
import { BlobStore } from '../../coordinator/blob-store.js'
import { CheckpointStore } from '../../coordinator/checkpoint-store.js'
import type { JobRecord } from '../../coordinator/job-store.js'
import { storePrepared } from '../../coordinator/prepared-blob.js'
import type { PreparedJob } from '../../coordinator/prepared-job.js'

let folder = ''
let blobs: BlobStore
let checkpoints: CheckpointStore
const jobs: JobRecord[] = []

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  blobs = await BlobStore.open(folder)
  checkpoints = new CheckpointStore(blobs)
  jobs.length = 0
})
afterEach(() => rmSync(folder, { recursive: true }))

const fileOf = (digest: string) => join(folder, 'sha256', digest.slice('sha256:'.length))
const isThere = (digest: string) => existsSync(fileOf(digest))
/** Last used that long ago. */
function age(digest: string, ms: number): void {
  const seconds = (Date.now() - ms) / 1000
  utimesSync(fileOf(digest), seconds, seconds)
}
const old = unnamedLifeMs + 60_000
async function blob(text: string): Promise<string> {
  const { digest } = await blobs.write([new TextEncoder().encode(text)])
  age(digest, old)
  return digest
}
const collect = () => {
  const store = { list: () => jobs }
  const log = pino({ level: 'silent' })
  return new BlobCollector({ blobs, checkpoints, store, wallMs: Date.now, log }).collect()
}

async function job(state: JobRecord['state']): Promise<string[]> {
  const train = await blob('train')
  const validation = await blob('validation')
  const dataset = (digest: string) => ({ shard: { digest, sizeBytes: 1 } })
  const prepared = {
    train: dataset(train),
    validation: null,
    validations: [{ name: 'eval', dataset: dataset(validation) }],
  } as unknown as PreparedJob
  const preparedDigest = await storePrepared(blobs, prepared)
  const result = await blob('result')
  const stateDigest = await blob('state')
  await checkpoints.store({
    jobId: 'job-a',
    step: 3,
    stateDigest,
    sizeBytes: 5,
    weightsSha256: '',
    commitSequence: 3,
  })
  const artifacts = [{ name: 'adapter', digest: result }]
  const record = { jobId: 'job-a', state, preparedDigest, adapterDigest: '', artifacts }
  jobs.push(record as unknown as JobRecord)
  const named = [train, validation, preparedDigest, result, stateDigest]
  for (const digest of named) age(digest, old)
  return named
}

for (const state of ['RUNNING', 'STOPPED', 'SUCCEEDED'] as const) {
  test(`keeps all that a ${state} job names, and removes what none does`, async () => {
    const named = await job(state)
    const unnamed = await blob('snapshot of a joiner')
    await collect()
    assert.ok(!isThere(unnamed))
    for (const digest of named) assert.ok(isThere(digest))
  })
}

test('keeps what was stored or asked for within a day', async () => {
  const within = await blob('within')
  age(within, unnamedLifeMs - 60_000)
  const asked = await blob('asked')
  blobs.status(asked)
  const beyond = await blob('beyond')
  await collect()
  assert.deepEqual([within, asked, beyond].map(isThere), [true, true, false])
})

test('removes nothing while it cannot tell what a job names', async () => {
  const [, , preparedDigest = ''] = await job('STOPPED')
  const unnamed = await blob('unnamed')
  rmSync(fileOf(preparedDigest))
  await collect()
  assert.ok(isThere(unnamed))
})

test('removes the state of a checkpoint only with its manifest', async () => {
  await job('STOPPED')
  const state = await blob('state')
  await collect()
  assert.ok(isThere(state))
  rmSync(join(folder, 'checkpoints'), { recursive: true })
  age(state, old)
  await collect()
  assert.ok(!isThere(state))
})
