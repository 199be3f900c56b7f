import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'
import { WorkerProcess } from './worker-process.js'

/** An answer "at once", on a busy machine. */
const promptMs = 5_000

describe('a worker that is asked to leave', { skip: engineMissing(), timeout: 120_000 }, () => {
  const outputs = temporaryFolder()
  let coordinator: TestCoordinator
  let worker: WorkerProcess

  before(async () => {
    coordinator = await TestCoordinator.open()
  })
  beforeEach(() => {
    worker = new WorkerProcess(coordinator)
  })
  afterEach(() => worker.discard())
  after(async () => {
    await coordinator.kill()
    coordinator.removeState()
    rmSync(outputs, { recursive: true, force: true })
  })

  /** Trains a job to its end on the worker, so that it is idle and has been at work. */
  async function train(name: string): Promise<void> {
    const settings = { max_steps: 2, gradient_accumulation_steps: 1 }
    const job = await coordinator.client.submit(tinyJob(join(outputs, name), settings))
    for await (const event of coordinator.client.watch(job.jobId)) {
      if (event.step?.step === 1) assert.equal(worker.workFolders().length, 1)
    }
    assert.equal((await coordinator.client.get(job.jobId)).state, 'SUCCEEDED')
  }

  async function endsAtOnce(): Promise<void> {
    const startedMs = performance.now()
    assert.equal(await worker.ended, 0, worker.stderr)
    const tookMs = performance.now() - startedMs
    assert.ok(tookMs < promptMs, `it took ${tookMs} ms`)
    assert.deepEqual(worker.workFolders(), [])
  }

  test('SIGTERM: one that has trained and has no job ends at once', async () => {
    await train('idle')
    worker.child.kill('SIGTERM')
    await endsAtOnce()
    while ((await coordinator.client.listWorkers()).length > 0); // its loss is noticed soon
  })

  test('SIGTERM in a job: leaves between steps; the job goes on with another worker', async () => {
    const job = await coordinator.client.submit(tinyJob(join(outputs, 'drained')))
    let another: WorkerProcess | null = null
    for await (const event of coordinator.client.watch(job.jobId)) {
      if (event.step?.step !== 2) continue
      worker.child.kill('SIGTERM')
      await endsAtOnce()
      another = new WorkerProcess(coordinator)
    }
    const ended = await coordinator.client.get(job.jobId)
    assert.deepEqual([ended.state, ended.step, ended.error], ['SUCCEEDED', 12, null])
    another?.child.kill('SIGTERM')
    assert.equal(await another?.ended, 0)
    another?.removeFolder()
  })

  test('its standard input ends: the work folder goes with it', async () => {
    await train('orphan')
    worker.child.stdin?.end()
    await endsAtOnce()
  })

  test('SIGTERM while the coordinator is gone, in a job or not: ends at once', async () => {
    const settings = { max_steps: 5_000 }
    const job = await coordinator.client.submit(tinyJob(join(outputs, 'lost'), settings))
    for await (const event of coordinator.client.watch(job.jobId)) {
      if (event.step?.step === 2) break
    }
    await coordinator.kill()
    worker.child.kill('SIGTERM')
    await endsAtOnce()
  })
})
