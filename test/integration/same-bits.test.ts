/** I1 and I2 on real processes: the number of workers changes who computes what, and no bit. */
import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { CommitRecord } from '../../proto/commit-record.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { connectionStatistics, readCommitLog } from './read-commit-log.js'
import { writeModel } from './same-bits-model.js'

const numSteps = 3
const microBatchesPerStep = 24
const leastElements = 1_000_000
const tuning = { sliceBlocks: 192, chunkBlocks: 64 }
const methods = { full: { finetuning: 'full' }, lora: { finetuning: 'lora', r: 96 } }
type Method = keyof typeof methods

const folder = temporaryFolder()
const model = join(folder, 'model')
/** By method: the weights of the first run. */
const expected = new Map<Method, string>()

const from0 = (length: number) => Array.from({ length }, (_, index) => index)

interface Trained {
  weightsSha256: string
  numElements: number
  commits: CommitRecord[]
}

async function train(
  { client, stateDir }: TestCoordinator,
  method: Method,
  outputDir: string,
): Promise<Trained> {
  const job = await client.submit(
    tinyJob(outputDir, {
      ...methods[method],
      model,
      max_length: 64,
      max_steps: numSteps,
      gradient_accumulation_steps: microBatchesPerStep,
      learning_rate: 1e-3,
      max_grad_norm: 0.1,
      save_steps: 0,
    }),
  )
  let numElements = 0
  for await (const event of client.watch(job.jobId)) {
    if (event.plan) numElements = Number(event.plan.numTrainedParameters)
  }
  const { state, weightsSha256, error } = await client.get(job.jobId)
  assert.deepEqual([state, error], ['SUCCEEDED', null])
  const records = (await readCommitLog(stateDir, job.jobId)).map(({ record }) => record)
  const commits = records.filter((record) => record.kind === 'commit')
  return { weightsSha256, numElements, commits }
}

/** Every micro-batch once, every worker's work in it, every worker an owner of its slices. */
function checkCommit(record: CommitRecord, numWorkers: number): void {
  const counted = record.leases.flatMap(({ microBatches }) => microBatches)
  assert.deepEqual(
    counted.sort((a, b) => a - b),
    from0(microBatchesPerStep),
  )
  const computing = record.leases.filter(({ microBatches }) => microBatches.length > 0)
  assert.equal(new Set(computing.map(({ workerId }) => workerId)).size, numWorkers)
  const owned = new Map<string, number>()
  for (const { workerId } of record.slices) owned.set(workerId, (owned.get(workerId) ?? 0) + 1)
  assert.equal(owned.size, numWorkers)
  assert.ok(Math.min(...owned.values()) >= 3, `slices by owner: ${[...owned.values()]}`)
}

function checkRun({ commits, numElements }: Trained, numWorkers: number): void {
  assert.ok(numElements >= leastElements, `${numElements} elements`)
  assert.deepEqual(
    commits.map(({ step }) => step),
    [1, 2, 3],
  )
  for (const commit of commits) checkCommit(commit, numWorkers)
  const numClipped = commits.filter(({ update }) => update.clipFactor < 1).length
  assert.ok(numClipped >= numSteps / 2, `clipped in ${numClipped} steps`)
  // Three an owner with seven workers; each of three frames.
  assert.ok((commits[0]?.slices.length ?? 0) >= 21)
}

/**
 * What nats-server counted: the frames go through it, and none of them to or from the coordinator.
 */
async function checkTraffic(stateDir: string, numElements: number): Promise<void> {
  const connections = await connectionStatistics(stateDir)
  const bytesOf = (user: string) =>
    connections
      .filter(({ role }) => role === user)
      .map(({ in_bytes, out_bytes }) => in_bytes + out_bytes)
  const workers = bytesOf('worker')
  // A worker sends half of its contributions and its half of the sums: 2 bytes an element and more.
  const leastBytes = numSteps * numElements * 2
  assert.equal(workers.length, 2)
  for (const bytes of workers) assert.ok(bytes > leastBytes, `${bytes} bytes of a worker`)
  const coordinator = bytesOf('coordinator').reduce((sum, bytes) => sum + bytes, 0)
  assert.ok(coordinator < leastBytes / 10, `${coordinator} bytes of the coordinator`)
}

describe('final weights', () => {
  before(() => writeModel(model))
  after(() => rmSync(folder, { recursive: true, force: true }))

  for (const numWorkers of [1, 2, 3, 7]) {
    it(`are the same on ${numWorkers} workers, full and LoRA, and all count`, async (test) => {
      const limits = { gatherMs: 60_000 }
      const coordinator = await TestCoordinator.open({
        workers: numWorkers,
        tuning: { ...tuning, limits },
      })
      test.after(() => coordinator.kill())
      for (const method of ['lora', 'full'] as const) {
        const trained = await train(coordinator, method, join(folder, `${method}-${numWorkers}`))
        checkRun(trained, numWorkers)
        const wanted = expected.get(method) ?? trained.weightsSha256
        expected.set(method, wanted)
        assert.equal(trained.weightsSha256, wanted)
        if (numWorkers === 2 && method === 'lora') {
          await checkTraffic(coordinator.stateDir, trained.numElements)
        }
      }
      await coordinator.close()
      coordinator.removeState()
    })
  }
})
