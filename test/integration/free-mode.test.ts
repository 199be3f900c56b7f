/** `deterministic: false`: a death costs no job, and a committed step is never computed again. */
import assert from 'node:assert/strict'
import { readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import type { TunemeshClient } from '../../client/client.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { readCommitLog } from './read-commit-log.js'

const numSteps = 12

interface Watched {
  isFree: boolean
  logged: string[]
}

async function toEnd(client: TunemeshClient, jobId: string): Promise<Watched> {
  const watched: Watched = { isFree: false, logged: [] }
  for await (const event of client.watch(jobId)) {
    if (event.plan) watched.isFree = event.plan.freeMode
    if (event.log) watched.logged.push(event.log.message)
  }
  const { state, error } = await client.get(jobId)
  assert.deepEqual([state, error], ['SUCCEEDED', null])
  return watched
}

const recordOf = (outputDir: string) => {
  const record = JSON.parse(readFileSync(join(outputDir, 'run.json'), 'utf8'))
  return record as { mode: string; steps: { step: number }[]; rollbacks: object[] }
}

describe('a job in free mode', { timeout: 120_000 }, () => {
  const folder = temporaryFolder()
  after(() => rmSync(folder, { recursive: true, force: true }))

  it('goes on where a worker is killed mid-step, and says which mode it ran in', async (test) => {
    const tuning = { workers: [{ failpoints: 'worker.before-lease-done:5' }] }
    const coordinator = await TestCoordinator.open({ workers: 2, tuning })
    test.after(() => coordinator.kill())
    const outputDir = join(folder, 'killed-worker')
    const { jobId } = await coordinator.client.submit(tinyJob(outputDir, { deterministic: false }))
    assert.equal((await toEnd(coordinator.client, jobId)).isFree, true)
    const { mode, steps } = recordOf(outputDir)
    assert.equal(mode, 'free')
    assert.equal(steps.length, numSteps)
    const log = await readCommitLog(coordinator.stateDir, jobId)
    const leases = log.flatMap(({ record }) => (record.kind === 'commit' ? record.leases : []))
    assert.ok(leases.some(({ leaseAttempt }) => leaseAttempt > 1))
  })

  it('is rolled back to its checkpoint where all of it is killed, and says so', async (test) => {
    const tuning = { failpoints: 'coordinator.after-append-commit:7' }
    const first = await TestCoordinator.open({ workers: 2, tuning })
    const outputDir = join(folder, 'killed-mesh')
    const { jobId } = await first.client.submit(tinyJob(outputDir, { deterministic: false }))
    await first.ended()
    const second = await TestCoordinator.open({ workers: 2, stateDir: first.stateDir })
    test.after(() => second.kill())
    const { logged } = await toEnd(second.client, jobId)
    assert.match(logged.join('\n'), /rolled back to the checkpoint of step 4: steps 5 to 7 .* free/)
    const { steps, rollbacks } = recordOf(outputDir)
    assert.equal(steps.length, numSteps)
    assert.equal(rollbacks.length, 1)
  })
})
