/** A device that fails mid-step, on real processes; the failure itself is provoked. */
import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, describe, test } from 'node:test'
import type { JobEvent } from '../../client/client.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'

const folder = temporaryFolder()

/** One job to its end, each worker with its own faults. */
async function runWith(...faults: string[]) {
  const workers = faults.map((failpoints) => ({ failpoints, options: {} }))
  const coordinator = await TestCoordinator.open({ workers: faults.length, tuning: { workers } })
  const { client } = coordinator
  try {
    const processes = new Set<number>()
    const { jobId } = await client.submit(tinyJob(join(folder, faults.join('-') || 'calm')))
    const events: JobEvent[] = []
    for await (const event of client.watch(jobId)) {
      events.push(event)
      for (const { processId } of await client.listWorkers()) processes.add(processId)
    }
    const { state, error, weightsSha256 } = await client.get(jobId)
    const warnings = events.flatMap(({ log }) => (log?.level === 'warn' ? [log.message] : []))
    const steps = events.flatMap(({ step }) => (step ? [step.step] : []))
    await coordinator.close()
    return { state, error, weightsSha256, warnings, steps, processes }
  } finally {
    await coordinator.kill()
    coordinator.removeState()
  }
}

describe('a device that fails mid-step', { skip: engineMissing(), timeout: 240_000 }, () => {
  after(() => rmSync(folder, { recursive: true, force: true }))

  test('the job goes on in a new process, alone or beside others, to the same bits', async () => {
    const calm = await runWith('')
    const alone = await runWith('worker.device-error:9')
    const together = await runWith('worker.device-error:4', '')
    for (const run of [alone, together]) {
      assert.deepEqual([run.state, run.error], ['SUCCEEDED', null])
      assert.equal(run.weightsSha256, calm.weightsSha256)
      const told = run.warnings.find((line) => line.includes('provoked')) ?? ''
      const expected = /^step \d+, micro-batch \d+: worker \S+ on .*copy_out failed.* starts anew;/
      assert.match(told, expected)
    }
    assert.equal(alone.processes.size, 2)
    assert.ok([...new Set(alone.steps)].length === 12)
  })

  test('a second time, in the same micro-batch, ends it and names the operation', async () => {
    const { state, error } = await runWith('worker.device-error:3', 'worker.device-error-again')
    assert.equal(state, 'FAILED')
    assert.equal(error?.code, 'DEVICE_FAILED')
    const expected = /^step \d+, micro-batch \d+ failed .*copy_out failed.*linear_forward failed/
    assert.match(error?.message ?? '', expected)
  })
})
