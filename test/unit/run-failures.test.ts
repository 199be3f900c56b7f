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
    worker: {
      workerId: 'w2',
      identity: 'h 2',
      deviceClass: 'x',
      host: 'h',
      device: 'd',
      precisions: ['fp32'],
    },
  })
  for (const workerId of ['w2', 'w1']) run.say(workerId, deviceFailure(0, -1, false))
  assert.deepEqual([run.outcome, run.disconnected], [null, ['w2', 'w1']])
  assert.equal(run.run.suspects.size, 0)
})

const engineFailure = (step: number) => ({
  failure: {
    jobId: 'job',
    step,
    microBatch: 0,
    error: { code: 'ENGINE_FAILED', message: 'notes is not iterable.' },
  },
})

const saysOf = (run: RunFixture) => run.events.flatMap(({ log }) => log?.message ?? [])

test('failures: one that fails at every attachment, alone, ends the job the third time', () => {
  const run = runWith(['w1'])
  for (let attachment = 1; attachment <= 3; attachment++) {
    assert.equal(run.outcome, null)
    run.say('w1', engineFailure(1))
    if (attachment < 3) {
      run.attach('w1')
      run.tick(5_000)
    }
  }
  assert.match(
    JSON.stringify(run.outcome),
    /ENGINE_FAILED.*w1 on host, the only one here, failed 3 times in a row.*notes is not iterable/,
  )
})

test('failures: beside others it is left idle the third time, under whatever id it comes', () => {
  const run = new RunFixture({ config: { wantedWorkers: 2 } })
  run.attach('w1')
  for (const workerId of ['w2', 'w3', 'w4']) {
    run.attach(workerId, { identity: 'h-1 cuda:0 joined-1' })
    run.say(workerId, engineFailure(1))
  }
  run.attach('w5', { identity: 'h-1 cuda:0 joined-1' })
  assert.equal(run.outcome, null)
  assert.equal(run.run.workers.get('w5')?.status, 'refused')
  const expected = /^worker w5 on host is left idle: WORKER_FAILED it failed 3 times in a row/
  assert.match(saysOf(run).at(-1) ?? '', expected)
  const told = run.sent.findLast(({ workerId }) => workerId === 'w5')?.message
  assert.match(told?.releaseJob?.reason ?? '', /ENGINE_FAILED notes is not iterable\. Mend that/)
  run.attach('w6', { identity: 'h-1 cuda:1 joined-1' })
  assert.notEqual(run.run.workers.get('w6')?.status, 'refused')
})

test('failures: a step that counts its work begins the count anew', () => {
  const run = runWith(['w1'])
  for (let step = 1; step <= 4; step++) {
    run.say('w1', engineFailure(step))
    run.attach('w1', { appliedStep: step - 1, appliedSequence: run.sequenceOf(step - 1) })
    run.tick(5_000)
    run.compute(step)
    run.applied('w1', step)
  }
  assert.equal(run.outcome, null)
})

test('back-off: a death counts for the process that takes its place, unless that lasts', () => {
  const run = runWith(['w1', 'w2'])
  const place = { identity: 'h-1 cuda:0 own-1' }
  const untilMs = () => run.run.histories.get(place.identity)?.untilMs ?? 0
  for (const [index, waitMs] of [1_000, 2_000, 4_000].entries()) {
    run.attach(`p${index}`, place)
    run.tick(waitMs)
    run.advance({ kind: 'workerLost', workerId: `p${index}`, reason: 'its connection broke' })
    assert.equal(untilMs() - run.nowMs, waitMs)
  }
  run.attach('p3', place)
  run.tick(100_000)
  run.advance({ kind: 'workerLost', workerId: 'p3', reason: 'its connection broke' })
  assert.equal(untilMs() - run.nowMs, 1_000)
})
