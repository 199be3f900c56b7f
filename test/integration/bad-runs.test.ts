/** I5 and I8 on real processes: what cannot go on says so, and what stands still is named. */
import assert from 'node:assert/strict'
import { readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import type { JobEvent, TunemeshClient } from '../../client/client.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { writePoisonedRow } from './poisoned-row.js'
import { readCommitLog } from './read-commit-log.js'
import { writeModel } from './same-bits-model.js'

const folder = temporaryFolder()

async function eventsOf(client: TunemeshClient, jobId: string): Promise<JobEvent[]> {
  const events: JobEvent[] = []
  for await (const event of client.watch(jobId)) events.push(event)
  return events
}

/** What a run with a poisoned row left behind that must not depend on its workers. */
async function skippingRun(numWorkers: number, poisoned: { model: string; data: string }) {
  const coordinator = await TestCoordinator.open({ workers: numWorkers })
  const { client, stateDir } = coordinator
  try {
    const settings = { ...poisoned, on_non_finite: 'skip', save_steps: 3, warmup_steps: 2 }
    const outputDir = join(folder, `skipping-${numWorkers}`)
    const { jobId } = await client.submit(tinyJob(outputDir, settings))
    const events = await eventsOf(client, jobId)
    const { state, error, weightsSha256, step } = await client.get(jobId)
    assert.deepEqual([state, error, step], ['SUCCEEDED', null, 12])
    const records = (await readCommitLog(stateDir, jobId)).map(({ record }) => record)
    const { skippedSteps } = JSON.parse(readFileSync(join(outputDir, 'run.json'), 'utf8'))
    await coordinator.close()
    return { events, records, weightsSha256, skippedSteps }
  } finally {
    await coordinator.kill()
    coordinator.removeState()
  }
}

after(() => rmSync(folder, { recursive: true, force: true }))

describe('a non-finite gradient', () => {
  it('ends the job with step, micro-batch and tensor; the last checkpoint stays', async (test) => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    test.after(() => coordinator.kill())
    const { client } = coordinator
    const { jobId } = await client.submit(
      tinyJob(join(folder, 'adapter'), {
        ...writePoisonedRow(join(folder, 'poisoned-row')),
        max_steps: 40,
        gradient_accumulation_steps: 2,
        save_steps: 1,
      }),
    )
    const events = await eventsOf(client, jobId)
    const { state, error } = await client.get(jobId)
    assert.equal(state, 'FAILED')
    assert.match(error?.code ?? '', /^(NON_FINITE_GRADIENT|GRADIENT_OUT_OF_RANGE)$/)
    assert.match(error?.message ?? '', /step \d+/)
    assert.match(error?.message ?? '', /micro-batch \d+/)
    assert.match(error?.message ?? '', /model\.|lora|weight/)
    const numCommitted = events.filter((event) => event.step).length
    const checkpoint = events.filter((event) => event.checkpoint).at(-1)?.checkpoint
    assert.ok(numCommitted >= 1 && (checkpoint?.step ?? 0) >= 1)
    const kept = await client.blobs.stat(checkpoint?.manifestDigest ?? '')
    assert.ok(kept)
    await coordinator.close()
    coordinator.removeState()
  })

  it('of a poisoned weight commits nothing', async (test) => {
    const coordinator = await TestCoordinator.open({ workers: 1 })
    test.after(() => coordinator.kill())
    const model = join(folder, 'poisoned')
    writeModel(model, { poison: Number.POSITIVE_INFINITY })
    const job = await coordinator.client.submit(tinyJob(join(folder, 'output'), { model }))
    const events = await eventsOf(coordinator.client, job.jobId)
    const { state, error } = await coordinator.client.get(job.jobId)
    assert.equal(state, 'FAILED')
    assert.match(error?.message ?? '', /step 1, micro-batch \d+, \S+lora_A\.weight/)
    assert.equal(events.filter((event) => event.step).length, 0)
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('a non-finite gradient under on_non_finite: skip', () => {
  it('skips whole steps, says so, and trains to the same bits with 1 and 2 workers', async () => {
    const poisoned = writePoisonedRow(join(folder, 'skipping'), 40)
    const [alone, together] = [await skippingRun(1, poisoned), await skippingRun(2, poisoned)]
    assert.equal(alone.weightsSha256, together.weightsSha256)
    for (const { events, records, skippedSteps } of [alone, together]) {
      const skips = records.filter((record) => record.kind === 'skip')
      const told = events.flatMap((event) => event.stepSkipped ?? [])
      assert.deepEqual(
        told.map(({ step, microBatch, tensor }) => [step, microBatch, tensor]),
        skips.map(({ step, microBatch, tensor }) => [step, microBatch, tensor]),
      )
      assert.deepEqual(
        skippedSteps,
        skips.map(({ step }) => step),
      )
      assert.ok(skips.length >= 2 && skips.every(({ tensor }) => /lora_[AB]/.test(tensor)))
      const steps = events.flatMap((event) => event.step ?? [])
      assert.equal(steps.length + skips.length, 12)
      assert.ok(steps.every(({ loss, gradNorm }) => Number.isFinite(loss + gradNorm)))
      // The schedule goes on; the exponent of the bias corrections counts updates only.
      let numUpdates = 0
      for (const record of records) {
        if (record.kind !== 'commit') continue
        const { update, step } = record
        numUpdates++
        const power = Math.exp(numUpdates * Math.log(0.9))
        assert.ok(Math.abs(update.biasCorrection1 - (1 - power)) < 1e-6, `step ${step}`)
        const factor = step <= 2 ? (step - 1) / 2 : (13 - step) / 10
        assert.ok(Math.abs(update.learningRate - 2e-4 * factor) < 1e-10, `step ${step}`)
      }
    }
    const skippedOf = ({ events }: { events: JobEvent[] }) =>
      events.flatMap((event) => event.stepSkipped?.step ?? [])
    assert.deepEqual(skippedOf(alone), skippedOf(together))
  })

  it('of every step ends the job: what was not trained is not delivered', async (test) => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    test.after(() => coordinator.kill())
    const model = join(folder, 'all-skipped')
    writeModel(model, { poison: Number.POSITIVE_INFINITY })
    const settings = { model, on_non_finite: 'skip', max_steps: 3 }
    const { jobId } = await coordinator.client.submit(tinyJob(join(folder, 'none'), settings))
    const events = await eventsOf(coordinator.client, jobId)
    const { state, error } = await coordinator.client.get(jobId)
    assert.deepEqual([state, error?.code], ['FAILED', 'NON_FINITE_GRADIENT'])
    assert.match(error?.message ?? '', /step 3, .* 3 steps in a row/)
    assert.deepEqual(
      events.flatMap((event) => event.stepSkipped?.step ?? []),
      [1, 2],
    )
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('a worker that stands still', () => {
  it('is named within seconds, given up, and does no harm when it wakes', async (test) => {
    const limits = { stallAfterMs: 500, firstBackoffMs: 100, deadAfterMs: 3_000 }
    const tuning = { heartbeatMs: 200, deadAfterMs: 3_000, limits }
    const coordinator = await TestCoordinator.open({ workers: 2, tuning })
    test.after(() => coordinator.kill())
    const { client } = coordinator
    const settings = { max_steps: 30 }
    const calm = await client.submit(tinyJob(join(folder, 'calm'), settings))
    await eventsOf(client, calm.jobId)
    const wanted = (await client.get(calm.jobId)).weightsSha256
    assert.notEqual(wanted, '')

    const { jobId } = await client.submit(tinyJob(join(folder, 'stopped'), settings))
    let sleeper: { workerId: string; processId: number } | undefined
    let stoppedMs = 0
    let namedAfterMs = 0
    let numStepsSince = 0
    for await (const event of client.watch(jobId)) {
      if (event.step?.step === 4 && !sleeper) {
        ;[sleeper] = await client.listWorkers()
        process.kill(sleeper?.processId ?? -1, 'SIGSTOP')
        stoppedMs = performance.now()
      }
      if (event.stalled && event.stalled.workerId === sleeper?.workerId && namedAfterMs === 0) {
        namedAfterMs = performance.now() - stoppedMs
        assert.ok(event.stalled.waitingFor !== '' && event.stalled.step >= 4)
      }
      // Steps go on, so it was declared dead: now the zombie wakes.
      if (namedAfterMs > 0 && event.step && numStepsSince++ === 0) {
        process.kill(sleeper?.processId ?? -1, 'SIGCONT')
      }
    }
    assert.ok(namedAfterMs > 0 && namedAfterMs < 5_000, `named after ${namedAfterMs} ms`)
    assert.ok(numStepsSince > 0)
    const { state, weightsSha256, error } = await client.get(jobId)
    assert.deepEqual([state, error], ['SUCCEEDED', null])
    assert.equal(weightsSha256, wanted)
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('workers that crash whenever they start', () => {
  it('fail the job with the number of tries and how they ended', async (test) => {
    const broken = { options: { device: { instructionPath: 'nonsense' } } }
    const tuning = { firstRestartMs: 10, workers: [broken, broken] }
    const coordinator = await TestCoordinator.open({ workers: 2, tuning })
    test.after(() => coordinator.kill())
    const { client } = coordinator
    for (const name of ['first', 'second']) {
      const { jobId } = await client.submit(tinyJob(join(folder, name)))
      await eventsOf(client, jobId)
      const { state, error } = await client.get(jobId)
      assert.deepEqual([state, error?.code], ['FAILED', 'WORKER_FAILED'])
      assert.match(error?.message ?? '', /crashed 8 times in a row.*exit status 1/)
    }
    await coordinator.close()
    coordinator.removeState()
  })
})
