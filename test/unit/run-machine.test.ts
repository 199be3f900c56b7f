/** The coordinator's decisions of one run, event by event; the simulation has the mixtures. */
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { defaultRunLimits } from '../../coordinator/run-events.js'
import { type FixtureOptions, RunFixture } from './run-machine-fixture.js'

function fleet(workerIds: string[], options: FixtureOptions = {}): RunFixture {
  const config = { wantedWorkers: workerIds.length, ...options.config }
  const run = new RunFixture({ ...options, config })
  for (const workerId of workerIds) run.attach(workerId)
  assert.equal(run.run.phase, 'running')
  return run
}

const four = ['w1', 'w2', 'w3', 'w4']
const shortLimits = { ...defaultRunLimits, giveUpAfterMs: 2_000 }

/** Leases of a step that are computed a second time. */
const leasedAgain = (run: RunFixture, step: number) =>
  (run.plan('w1', step)?.leases ?? [])
    .filter(({ leaseAttempt }) => leaseAttempt === 2)
    .map(({ lease, microBatches, onlySlices }) => ({ lease, microBatches, onlySlices }))

test('lease: a report from an older fleet epoch is refused and leaves the lease unchanged', () => {
  const run = fleet(['w1', 'w2'])
  const older = { ...run.key(1), fleetEpoch: run.run.log.fleetEpoch - 1 }
  const losses = [{ microBatch: 0, lossSum: 1 }]
  run.say('w1', { leaseDone: { ...older, lease: 0, leaseAttempt: 1, losses } })
  const lease = run.run.steps.get(1)?.leases[0]
  assert.deepEqual([lease?.losses, lease?.attempts[0]?.isDone], [null, false])
  run.leaseDone('w1', 1, 0)
  assert.equal(lease?.attempts[0]?.isDone, true)
})

test('lease: a report of an attempt that another worker has is refused', () => {
  const run = fleet(['w1', 'w2'])
  run.leaseDone('w2', 1, 0)
  assert.equal(run.run.steps.get(1)?.leases[0]?.losses, null)
})

test('commit: worker 2 of 4 dies, its slices sent; only the one it owned is added again', () => {
  const run = fleet(four)
  for (const [lease, workerId] of four.entries()) run.leaseDone(workerId, 1, lease)
  run.leaseDelivered('w2', 1, 1)
  run.lose('w2')
  assert.deepEqual(leasedAgain(run, 1), [{ lease: 1, microBatches: [1], onlySlices: [1] }])
  const owners = run.plan('w1', 1)?.owners ?? []
  assert.deepEqual(
    owners.map(({ sliceAttempt }) => sliceAttempt),
    [1, 2, 1, 1],
  )
})

test('commit: worker 2 of 4 dies, half its slices sent; only its work is computed again', () => {
  const run = fleet(four, { microBatchesPerStep: 8 })
  for (const [lease, workerId] of four.entries()) run.leaseDone(workerId, 1, lease)
  // Of its contribution slices 0 and 2 are in sums that are done, 1 and 3 in none.
  run.sliceDone(1, 0)
  run.sliceDone(1, 2)
  run.lose('w2')
  assert.deepEqual(leasedAgain(run, 1), [{ lease: 1, microBatches: [2, 3], onlySlices: [1, 3] }])
  assert.equal(run.plan('w1', 1)?.owners?.[1]?.sliceAttempt, 2)
})

test('network: worker 2 hears nothing (one-way partition); its work is leased again', () => {
  const run = fleet(['w1', 'w2'], { config: { limits: shortLimits } })
  run.leaseDone('w1', 1, 0)
  for (let waitedMs = 0; waitedMs <= shortLimits.giveUpAfterMs; waitedMs += 250) {
    for (const workerId of ['w1', 'w2']) run.say(workerId, { heartbeat: { step: 0 } })
    run.tick(250)
  }
  assert.deepEqual(run.disconnected, ['w2'])
  assert.deepEqual(
    leasedAgain(run, 1).map(({ lease }) => lease),
    [1],
  )
  run.leaseDone('w2', 1, 1)
  assert.equal(run.run.steps.get(1)?.leases[1]?.attempts[0]?.isDone, false)
})

test('network: a silent worker is dead after deadAfterMs, not before', () => {
  const run = fleet(['w1', 'w2'])
  const { deadAfterMs } = run.run.config.limits
  for (let waitedMs = 0; waitedMs < deadAfterMs; waitedMs += 500) {
    run.say('w1', { heartbeat: {} })
    run.tick(500)
  }
  assert.deepEqual(run.disconnected, [])
  run.tick(500)
  assert.deepEqual(run.disconnected, ['w2'])
})

test('commit: announced only when the log has acknowledged it', () => {
  const run = fleet(['w1', 'w2'])
  run.silentKind = 'commit'
  run.compute(1)
  assert.equal(run.kinds().at(-1), 'commit')
  assert.deepEqual(run.toWorker('w1', 'commit'), [])
  run.acknowledge()
  assert.equal(run.toWorker('w1', 'commit')[0]?.step, 1)
})

test('commit: a step applied from the log before its acknowledgement counts as applied', () => {
  const run = fleet(['w1', 'w2'])
  run.silentKind = 'commit'
  run.compute(1)
  run.applied('w1', 1)
  assert.equal(run.run.workers.get('w1')?.appliedStep, 0)
  run.acknowledge()
  assert.equal(run.run.workers.get('w1')?.appliedStep, 1)
})

test('commit: a worker that applied a rolled-back step of that number must come anew', () => {
  const run = fleet(['w1', 'w2'])
  run.compute(1)
  run.applied('w1', 1)
  run.applied('w2', 1, run.sequenceOf(1) - 1)
  assert.deepEqual(run.disconnected, ['w2'])
  assert.equal(run.run.workers.get('w1')?.appliedStep, 1)
})

test('planner: a step is planned only when every member stands at most two behind', () => {
  const run = fleet(['w1', 'w2'])
  assert.equal(run.plannedThrough('w1'), 2)
  run.compute(1)
  run.applied('w1', 1)
  assert.equal(run.plannedThrough('w1'), 2)
  run.applied('w2', 1)
  assert.equal(run.plannedThrough('w1'), 3)
})

// ---- joins and drains ----

test('join: a worker that waits for a snapshot hears of an epoch raise', () => {
  const run = fleet(['w1', 'w2'])
  run.finishPlanned(['w1', 'w2'])
  run.attach('w3')
  assert.equal(run.run.workers.get('w3')?.stage, 'snapshot')
  run.say('w2', { drain: { reason: 'SIGTERM' } })
  run.finishPlanned(['w1', 'w2'])
  const raised = run.toWorker('w3', 'epoch').at(-1)
  assert.deepEqual([raised?.fleetEpoch, raised?.workerIds], [run.run.log.fleetEpoch, ['w1']])
})

test('join: a lone worker that drains gives its snapshot to the one that joins', () => {
  const run = fleet(['w1'])
  run.finishPlanned(['w1'])
  run.attach('w2')
  run.say('w1', { drain: { reason: 'SIGTERM' } })
  run.finishPlanned(['w1'])
  const asked = run.toWorker('w1', 'uploadState').at(-1)
  assert.deepEqual([asked?.step, asked?.purpose], [run.run.log.committedStep, 'snapshot'])
})

test('join: a lone worker stands still until the one that joins is proved', () => {
  const run = fleet(['w1'])
  run.finishPlanned(['w1'])
  const step = run.plannedThrough('w1')
  run.attach('w2')
  run.finishPlanned(['w1'])
  assert.equal(run.plannedThrough('w1'), step)
  const upload = run.toWorker('w1', 'uploadState').at(-1)
  assert.deepEqual([upload?.step, upload?.purpose], [step, 'snapshot'])
  run.say('w1', { stateUploaded: { jobId: 'job', step, purpose: 'snapshot', digest: 'd' } })
  run.say('w2', { stateLoaded: { jobId: 'job', step } })
  const digest = '00000000000000aa'
  for (const workerId of ['w1', 'w2']) {
    assert.equal(run.toWorker(workerId, 'probe').at(-1)?.step, step)
    run.say(workerId, { probeResult: { jobId: 'job', step, digest } })
  }
  assert.equal(run.run.workers.get('w2')?.status, 'member')
  assert.equal(run.plannedThrough('w2'), step + 2)
})

test('join: a worker that was to be probed when the others left loads a snapshot', () => {
  const run = fleet(['w1', 'w2'])
  run.finishPlanned(['w1', 'w2'])
  const appliedStep = run.run.log.committedStep
  run.attach('w3', { appliedStep, appliedSequence: run.sequenceOf(appliedStep) })
  run.say('w2', { drain: { reason: 'SIGTERM' } })
  run.finishPlanned(['w1', 'w2'])
  const asked = run.toWorker('w1', 'uploadState').at(-1)
  assert.deepEqual([asked?.step, asked?.purpose], [run.run.log.committedStep, 'snapshot'])
  assert.equal(run.run.workers.get('w3')?.probe, null)
})

test('drain: while a fleet is gathered a draining worker without news is let go', () => {
  const run = new RunFixture({ config: { wantedWorkers: 2 } })
  run.attach('w1')
  run.say('w1', { drain: { reason: 'SIGTERM' } })
  assert.equal(run.toWorker('w1', 'shutdown').length, 1)
})

test('drain: the only worker with the last steps is kept while a fleet is gathered', () => {
  const run = new RunFixture({ config: { wantedWorkers: 2 } })
  run.attach('w1')
  run.tick(run.run.config.limits.gatherMs)
  run.compute(1)
  run.applied('w1', 1)
  const appliedSequence = run.sequenceOf(1)
  run.lose('w1')
  assert.equal(run.run.phase, 'gathering')
  run.attach('w1', { appliedStep: 1, appliedSequence })
  run.say('w1', { drain: { reason: 'SIGTERM' } })
  assert.deepEqual(run.toWorker('w1', 'shutdown'), [])
  run.tick(run.run.config.limits.gatherMs)
  const asked = run.toWorker('w1', 'uploadState').at(-1)
  assert.deepEqual([asked?.step, asked?.purpose], [1, 'checkpoint'])
})

test('crash loop: the job fails with its cause when the last worker is gone for good', () => {
  const run = fleet(['w1', 'w2'])
  run.lose('w1')
  const failure = { code: 'WORKER_FAILED' as const, message: 'crashed 8 times in a row' }
  run.advance({ kind: 'workersExhausted', failure })
  assert.equal(run.outcome, null)
  run.lose('w2')
  assert.deepEqual(failureOf(run), failure)
})

test('crash loop: a worker from elsewhere keeps the job going', () => {
  const run = fleet(['w1'])
  run.attach('w2')
  const failure = { code: 'WORKER_FAILED' as const, message: 'crashed 8 times in a row' }
  run.advance({ kind: 'workersExhausted', failure })
  run.lose('w1')
  assert.equal(run.outcome, null)
})

// ---- a gradient that is not finite ----

const nonFinite = (run: RunFixture, step: number, microBatch = 0) =>
  run.say('w1', {
    failure: {
      jobId: 'job',
      step,
      microBatch,
      tensor: 'lm_head.weight',
      error: { code: 'NON_FINITE_GRADIENT', message: 'NaN.' },
    },
  })
const failureOf = ({ outcome }: RunFixture) => (outcome?.kind === 'failed' ? outcome.failure : null)
const skipping: FixtureOptions = { config: { onNonFinite: 'skip' } }

test('non-finite: by default the job stops with worker, step, micro-batch and tensor', () => {
  const run = fleet(['w1', 'w2'])
  nonFinite(run, 1, 2)
  const failure = failureOf(run)
  assert.equal(failure?.code, 'NON_FINITE_GRADIENT')
  assert.match(failure.message, /^worker w1, step 1, micro-batch 2, lm_head\.weight: NaN/)
})

test('non-finite: a skipped step counts in the schedule, not in the bias corrections', () => {
  const run = fleet(['w1', 'w2'], skipping)
  nonFinite(run, 1, 2)
  assert.equal(run.kinds().at(-1), 'skip')
  assert.equal(run.toWorker('w2', 'commit')[0]?.skipped, true)
  assert.deepEqual(run.events.flatMap((event) => event.stepSkipped ?? []).at(-1), {
    step: 1,
    numSteps: 20,
    microBatch: 2,
    tensor: 'lm_head.weight',
    reason: 'NaN.',
    dataEpoch: 1 / 20,
    etaMs: 0,
    fleetEpoch: run.run.log.fleetEpoch,
  })
  for (const workerId of ['w1', 'w2']) run.applied(workerId, 1)
  run.compute(2)
  const last = run.log.at(-1)?.record
  assert.ok(last?.kind === 'commit' && last.step === 2)
  assert.equal(last.update.learningRate, Math.fround(1 / 2))
  assert.equal(last.update.biasCorrection1, Math.fround(1 - 0.9))
})

test('non-finite: a second report of a step that is being skipped changes nothing', () => {
  const run = fleet(['w1', 'w2'], skipping)
  run.silentKind = 'skip'
  nonFinite(run, 1)
  nonFinite(run, 1, 3)
  run.acknowledge()
  nonFinite(run, 1, 3)
  assert.deepEqual(
    run.kinds().filter((kind) => kind === 'skip'),
    ['skip'],
  )
})

test('non-finite: ten skips in a row stop the job, nine and a commit do not', () => {
  const run = fleet(['w1'], skipping)
  const skip = (step: number) => {
    nonFinite(run, step)
    run.applied('w1', step)
  }
  for (let step = 1; step <= 9; step++) skip(step)
  run.compute(10)
  run.applied('w1', 10)
  for (let step = 11; step <= 19; step++) skip(step)
  assert.equal(run.outcome, null)
  skip(20)
  assert.match(failureOf(run)?.message ?? '', /step 20, .* 10 steps in a row/)
  assert.equal(run.run.log.committedStep, 19)
})

test('non-finite: a job of two steps, both skipped, stops', () => {
  const run = fleet(['w1'], { ...skipping, numSteps: 2 })
  nonFinite(run, 1)
  run.applied('w1', 1)
  nonFinite(run, 2)
  assert.equal(run.outcome?.kind, 'failed')
})

test('non-finite: a failure that names no micro-batch is no step to skip', () => {
  const run = fleet(['w1'], skipping)
  nonFinite(run, 1, -1)
  assert.equal(run.outcome?.kind, 'failed')
})

test('precision: a worker that lacks it is told by name and left idle, the others go on', () => {
  const run = new RunFixture({ config: { precision: 'bf16' } })
  run.attach('cpu1', { precisions: ['fp32'] })
  assert.deepEqual(run.toWorker('cpu1', 'prepare'), [])
  const reason = 'the job computes in bf16, which its device "cpu" can not'
  assert.deepEqual(run.toWorker('cpu1', 'releaseJob'), [{ jobId: 'job', reason }])
  const told = run.events.flatMap(({ log }) => (log ? [log] : []))
  const message = `worker cpu1 on host is left idle: ${reason}`
  assert.deepEqual(told, [{ level: 'warn', message }])
  run.attach('gpu1', { precisions: ['fp32', 'bf16'] })
  run.tick(5_000)
  assert.equal(run.plannedThrough('gpu1'), 2)
  assert.deepEqual(run.toWorker('cpu1', 'stepPlan'), [])
  run.attach('cpu2', { precisions: ['fp32'] })
  run.finishPlanned(['gpu1'])
  assert.deepEqual([run.outcome, run.run.workers.get('cpu2')?.status], [null, 'refused'])
})

test('precision: with nobody who has it the run waits, then names who can not take part', () => {
  const run = new RunFixture({ config: { precision: 'bf16' } })
  run.attach('cpu1', { precisions: ['fp32'] })
  run.tick(1)
  run.tick(600_001)
  assert.match(JSON.stringify(run.outcome), /NO_WORKERS.*cpu1 can not take part/)
})

test('precision: the class of the engine that the job opened is the one that commits name', () => {
  const run = new RunFixture({ config: { precision: 'bf16' } })
  run.attach('gpu1', { precisions: ['fp32', 'bf16'], deviceClass: 'with cuDNN 9.12' })
  run.finishPlanned(['gpu1'])
  const commit = run.log.find(({ record }) => record.kind === 'commit')?.record
  assert.match(JSON.stringify(commit), /"deviceClass":"with cuDNN 9\.12"/)
})
