/**
 * A job may be stopped after any step, or its coordinator killed there: the rest is as it was going
 * to be.
 */
import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import type { TunemeshClient } from '../../client/client.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'

const numSteps = 12
const from1 = (length: number) => Array.from({ length }, (_, index) => index + 1)

interface Ended {
  state: string
  weightsSha256: string
  steps: number[]
}

async function toEnd(client: TunemeshClient, jobId: string): Promise<Ended> {
  const steps: number[] = []
  for await (const event of client.watch(jobId)) {
    if (event.step) steps.push(event.step.step)
  }
  const { state, weightsSha256 } = await client.get(jobId)
  return { state, weightsSha256, steps }
}

async function untilStep(client: TunemeshClient, jobId: string, step: number): Promise<void> {
  for await (const event of client.watch(jobId)) {
    if (event.step?.step === step) return
  }
}

describe('a job of 12 steps', { timeout: 240_000 }, () => {
  const folder = temporaryFolder()
  let coordinator: TestCoordinator
  let undisturbed: Ended
  before(async () => {
    coordinator = await TestCoordinator.open({ workers: 2 })
    const { jobId } = await coordinator.client.submit(tinyJob(join(folder, 'undisturbed')))
    undisturbed = await toEnd(coordinator.client, jobId)
    assert.equal(undisturbed.state, 'SUCCEEDED')
    assert.deepEqual(undisturbed.steps, from1(numSteps))
  })
  after(async () => {
    await coordinator.close()
    coordinator.removeState()
    rmSync(folder, { recursive: true, force: true })
  })

  for (const step of from1(numSteps - 1)) {
    it(`stopped after step ${step} and resumed ends as undisturbed`, async () => {
      const { client } = coordinator
      const { jobId } = await client.submit(tinyJob(join(folder, `stopped-${step}`)))
      await untilStep(client, jobId, step)
      await client.stop(jobId)
      const stopped = await toEnd(client, jobId)
      if (step < numSteps - 1) assert.equal(stopped.state, 'STOPPED')
      if (stopped.state === 'STOPPED') await client.resume(jobId)
      assert.deepEqual(await toEnd(client, jobId), undisturbed)
    })
  }

  for (const step of [2, 7, 11]) {
    it(`ends as undisturbed after kill -9 at the commit of step ${step}`, async () => {
      const tuning = { failpoints: `coordinator.after-append-commit:${step}` }
      const first = await TestCoordinator.open({ workers: 2, tuning })
      const { jobId } = await first.client.submit(tinyJob(join(folder, `killed-${step}`)))
      await first.ended()
      const second = await TestCoordinator.open({ workers: 2, stateDir: first.stateDir })
      assert.deepEqual(await toEnd(second.client, jobId), undisturbed)
      await second.close()
      second.removeState()
    })
  }
})
