/** What a device's failure does to a run; the simulation has it among all other faults. */
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { RunFixture } from './run-machine-fixture.js'

function runWith(workerIds: string[]): RunFixture {
  const run = new RunFixture({ config: { wantedWorkers: workerIds.length } })
  for (const workerId of workerIds) run.attach(workerId)
  return run
}

const deviceFailure = (step: number, microBatch: number, checked: boolean) => ({
  failure: {
    jobId: 'job',
    step,
    microBatch,
    checked,
    error: { code: 'DEVICE_FAILED', message: `${checked ? 'linear_forward' : 'copy_out'} failed.` },
  },
})

test('device: after a failure the micro-batch is leased again checked, and the run goes on', () => {
  const run = runWith(['w1', 'w2'])
  const lease = run.run.steps.get(1)?.leases.find(({ attempts }) => attempts[0]?.workerId === 'w1')
  const microBatch = lease?.microBatches[0] ?? -1
  run.say('w1', deviceFailure(1, microBatch, false))
  assert.deepEqual([run.outcome, run.disconnected], [null, ['w1']])
  const checked = run.plan('w2', 1)?.microBatches?.filter((entry) => entry.checked)
  assert.deepEqual(
    checked?.map((entry) => entry.microBatch),
    [microBatch],
  )
  const [told] = run.events.flatMap(({ log }) => log?.message ?? [])
  assert.match(
    told ?? '',
    /^step 1, micro-batch \d: worker w1 on host: copy_out failed\. .* checked/,
  )
})

test('device: a second failure, checked, names the operation and ends the job', () => {
  const run = runWith(['w1', 'w2'])
  run.say('w1', deviceFailure(1, 0, false))
  run.say('w2', deviceFailure(1, 0, true))
  assert.match(
    JSON.stringify(run.outcome),
    /DEVICE_FAILED.*step 1, micro-batch 0 .*w1 .*copy_out failed.*w2 .*linear_forward failed/,
  )
})

test('device: two failures of the same micro-batch, neither checked, end nothing', () => {
  const run = runWith(['w1', 'w2', 'w3'])
  run.say('w1', deviceFailure(1, 0, false))
  run.say('w2', deviceFailure(1, 0, false))
  assert.deepEqual([run.outcome, run.disconnected], [null, ['w1', 'w2']])
})

test('device: a failure outside of a micro-batch is a death, while it prepares as well', () => {
  const run = runWith(['w1'])
  run.advance({
    kind: 'workerAttached',
    worker: { workerId: 'w2', deviceClass: 'x', host: 'h', device: 'd', precisions: ['fp32'] },
  })
  for (const workerId of ['w2', 'w1']) run.say(workerId, deviceFailure(0, -1, false))
  assert.deepEqual([run.outcome, run.disconnected], [null, ['w2', 'w1']])
  assert.equal(run.run.suspects.size, 0)
})
