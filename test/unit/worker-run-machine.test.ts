/** A worker's decisions in one run, event by event; the simulation has the mixtures. */
import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { FromWorker } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { StepPlan } from '../../proto/gen/tunemesh/v1/StepPlan.js'
import type { ToWorker, ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { WorkerService } from '../../proto/services.js'
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { WorkerRunMachine } from '../../worker/run-machine.js'

const wire = WorkerService.service.Attach
const numSlices = 2

/** Worker w1 of w1 and w2; it owns slice 0 unless a plan says otherwise. */
class WorkerFixture {
  readonly effects: WorkerEffect[] = []
  readonly machine: WorkerRunMachine
  #nowMs = 0

  constructor(numContributionSlots = 2) {
    const times = { doubtAfterMs: 400, requestSumEveryMs: 50 }
    this.machine = new WorkerRunMachine({ workerId: '', numContributionSlots, ...times })
    this.advance({ kind: 'attached', workerId: 'w1' })
    this.hear({ prepare: { jobId: 'job', sliceBlocks: 1, chunkBlocks: 1, trainSpecJson: '{}' } })
    this.advance({
      kind: 'enginePrepared',
      planHash: 'plan',
      memory: { totalBytes: 0, uses: [] },
      numBlocks: numSlices,
      numTrainedParameters: numSlices,
      weightsSha256: '',
      deviceClass: 'cpu',
    })
    this.epoch(1, 0)
  }

  advance(event: WorkerEvent): void {
    this.effects.push(...this.machine.advance(event, this.#nowMs))
  }

  tick(afterMs: number): void {
    this.#nowMs += afterMs
    this.advance({ kind: 'tick' })
  }

  hear(message: ToWorker): void {
    const sent = wire.responseDeserialize(wire.responseSerialize(message)) as ToWorker__Output
    this.advance({ kind: 'message', message: sent })
  }

  epoch(fleetEpoch: number, step: number, workerIds = ['w1', 'w2']): void {
    this.hear({ epoch: { jobId: 'job', fleetEpoch, step, workerIds } })
  }

  /** Lease 0 with micro-batch 0 is w1's, lease 1 with micro-batch 1 is w2's. */
  plan(step: number, changes: Partial<StepPlan> = {}): void {
    const microBatches = [0, 1].map((microBatch) => ({ microBatch, packs: [microBatch] }))
    const leases = ['w1', 'w2'].map((workerId, lease) => leaseOf(workerId, lease))
    const owners = ['w1', 'w2'].map((workerId, slice) => ({ slice, sliceAttempt: 1, workerId }))
    const plan = { leases, owners, microBatches, revision: 1, lossDivisor: 4, ...changes }
    this.hear({ stepPlan: { jobId: 'job', fleetEpoch: 1, step, ...plan } })
  }

  /** Backward of the lease's last micro-batch. */
  compute(step: number, lease: number, leaseAttempt = 1): void {
    const key = { fleetEpoch: 1, step, lease, leaseAttempt }
    const { slot = 0 } = this.last('computeMicroBatch') ?? {}
    for (let slice = numSlices - 1; slice >= 0; slice--) {
      this.advance({ kind: 'sliceReady', ...key, slot, slice, digest: digestOf(slice) })
    }
    const counts = { lossSum: 1, numTargetTokens: 1, numTokens: 1, computeMs: 1 }
    this.advance({ kind: 'microBatchDone', ...key, slot, microBatch: lease, ...counts })
  }

  arrive(step: number, slice: number, lease: number, leaseAttempt = 1): void {
    const key = { fleetEpoch: 1, step, lease, leaseAttempt, slice, sliceAttempt: 1 }
    this.advance({ kind: 'contributionArrived', ...key, digest: digestOf(slice) })
  }

  finish(step: number, slice: number, sliceAttempt = 1): void {
    const sums = { sumDigest: digestOf(slice), publishedDigest: digestOf(slice), sumSquares: 1 }
    const key = { fleetEpoch: 1, step, slice, sliceAttempt }
    this.advance({ kind: 'sliceFinished', ...key, ...sums })
  }

  commit(step: number, streamSequence = 10 * step): void {
    const slices = [0, 1].map((slice) => ({ slice, publishedDigest: digestOf(slice) }))
    this.hear({ commit: { jobId: 'job', fleetEpoch: 1, step, slices, streamSequence } })
  }

  applied(step: number): void {
    this.advance({ kind: 'updateApplied', step, weightsSha256: '', applyMs: 1 })
  }

  of<Kind extends WorkerEffect['kind']>(kind: Kind) {
    return this.effects.filter(
      (effect): effect is Extract<WorkerEffect, { kind: Kind }> => effect.kind === kind,
    )
  }

  last<Kind extends WorkerEffect['kind']>(kind: Kind) {
    return this.of(kind).at(-1)
  }

  /** Reports of this name, oldest first. */
  told<Name extends keyof FromWorker>(name: Name) {
    return this.of('send').flatMap(({ message }) => {
      const body = message[name]
      return body ? [body as NonNullable<FromWorker[Name]>] : []
    })
  }
}

const leaseOf = (workerId: string, lease: number, leaseAttempt = 1) => ({
  lease,
  leaseAttempt,
  workerId,
  microBatches: [lease],
})
const digestOf = (slice: number) => `${slice}`.padStart(16, '0')

/** Step 1 is applied; step 2 is planned. */
function afterStepOne(numContributionSlots = 2): WorkerFixture {
  const worker = new WorkerFixture(numContributionSlots)
  worker.plan(1)
  worker.plan(2)
  worker.compute(1, 0)
  worker.arrive(1, 0, 1)
  worker.finish(1, 0)
  worker.advance({ kind: 'sumArrived', step: 1, slice: 1, digest: digestOf(1) })
  worker.commit(1)
  worker.applied(1)
  return worker
}

test('lease: a plan of an older fleet epoch is refused, nothing is computed for it', () => {
  const worker = new WorkerFixture()
  worker.epoch(2, 0)
  worker.plan(1)
  assert.deepEqual(worker.of('computeMicroBatch'), [])
})

test('lease: an epoch raise voids it; what comes of it is not reported', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.epoch(2, 0)
  worker.compute(1, 0)
  assert.deepEqual(worker.told('leaseDone'), [])
  assert.deepEqual(worker.of('sendContribution'), [])
  assert.deepEqual(worker.machine.run.slots, [null, null])
})

test('network: a worker that hears nothing more ends what it was leased and starts nothing', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.plan(2)
  worker.compute(1, 0)
  worker.arrive(1, 0, 1)
  worker.finish(1, 0)
  const numEffects = worker.effects.length
  for (let ticks = 0; ticks < 100; ticks++) worker.tick(250)
  assert.deepEqual(
    worker.effects.slice(numEffects).map(({ kind }) => kind),
    [],
  )
  assert.equal(worker.machine.run.appliedStep, 0)
})

test('network: with every sum of a step and no commit a worker reads the log, in time', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.compute(1, 0)
  worker.arrive(1, 0, 1)
  worker.finish(1, 0)
  worker.advance({ kind: 'sumArrived', step: 1, slice: 1, digest: digestOf(1) })
  worker.tick(399)
  assert.deepEqual(worker.of('readCommitLog'), [])
  worker.tick(1)
  assert.deepEqual(worker.of('readCommitLog'), [{ kind: 'readCommitLog', afterSequence: 0 }])
  worker.advance({ kind: 'commitLogRead', records: [] })
  assert.deepEqual(worker.of('applyUpdate'), [])
})

test('slice: a lease counts once, from the attempt that was complete first', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.arrive(1, 0, 1, 1)
  worker.arrive(1, 0, 1, 2)
  const counted = worker
    .of('countContribution')
    .map(({ lease, leaseAttempt }) => [lease, leaseAttempt])
  assert.deepEqual(counted, [[1, 1]])
  assert.equal(worker.last('dropContribution')?.leaseAttempt, 2)
})

test('slice: of the next step it is opened only once this one is applied', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.plan(2)
  const opened = () => worker.of('openSlice').map(({ step, slice }) => `${step}/${slice}`)
  assert.deepEqual(opened(), ['1/0'])
  // Slice 1 of step 1 moves here: it finds its accumulator free.
  const owners = [0, 1].map((slice) => ({ slice, sliceAttempt: slice + 1, workerId: 'w1' }))
  worker.plan(1, { revision: 2, owners })
  assert.deepEqual(opened(), ['1/0', '1/1'])
  const next = afterStepOne()
  assert.deepEqual(
    next.of('openSlice').map(({ step }) => step),
    [1, 2],
  )
})

test('slice: one that moves here while its step is being applied is not opened', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.compute(1, 0)
  worker.arrive(1, 0, 1)
  worker.finish(1, 0)
  worker.advance({ kind: 'sumArrived', step: 1, slice: 1, digest: digestOf(1) })
  worker.commit(1)
  assert.equal(worker.last('applyUpdate')?.step, 1)
  const owners = [0, 1].map((slice) => ({ slice, sliceAttempt: slice + 1, workerId: 'w1' }))
  worker.plan(1, { revision: 2, owners })
  assert.deepEqual(
    worker.of('openSlice').map(({ slice }) => slice),
    [0],
  )
})

test('slot: a second attempt is delivered where the sum counts the first one already', () => {
  const worker = new WorkerFixture(1)
  worker.plan(1)
  worker.compute(1, 0)
  worker.arrive(1, 0, 1)
  worker.finish(1, 0)
  const delivered = { fleetEpoch: 1, step: 1, lease: 0, leaseAttempt: 1 }
  worker.advance({ kind: 'contributionDelivered', ...delivered, slice: 1, sliceAttempt: 1 })
  // w2 is dead: its lease comes here, and its slice. The sum of slice 0 has counted the lease.
  const leases = [leaseOf('w1', 0), leaseOf('w2', 1), leaseOf('w1', 1, 2)]
  const owners = [0, 1].map((slice) => ({ slice, sliceAttempt: slice + 1, workerId: 'w1' }))
  worker.plan(1, { revision: 2, leases, owners })
  worker.compute(1, 1, 2)
  const told = worker.told('leaseDelivered').at(-1)
  assert.deepEqual(
    [told?.lease, told?.leaseAttempt, told?.slices],
    [
      1,
      2,
      [
        { slice: 0, sliceAttempt: 1 },
        { slice: 1, sliceAttempt: 2 },
      ],
    ],
  )
})

test('commit: what the log rolled back is forgotten at the epoch raise and never applied', () => {
  const worker = afterStepOne()
  worker.commit(2)
  worker.epoch(2, 1)
  for (const slice of [0, 1]) {
    worker.advance({ kind: 'sumArrived', step: 2, slice, digest: digestOf(slice) })
  }
  assert.deepEqual(
    worker.of('applyUpdate').map(({ step }) => step),
    [1],
  )
})

test('commit: a worker that is prepared again waits for what is announced anew', () => {
  const worker = afterStepOne()
  worker.commit(2)
  worker.hear({ prepare: { jobId: 'job', sliceBlocks: 1, chunkBlocks: 1, trainSpecJson: '{}' } })
  for (const slice of [0, 1]) {
    worker.advance({ kind: 'sumArrived', step: 2, slice, digest: digestOf(slice) })
  }
  assert.equal(worker.of('applyUpdate').length, 1)
  worker.commit(2, 21)
  assert.equal(worker.of('applyUpdate').length, 2)
  worker.applied(2)
  assert.equal(worker.told('applied').at(-1)?.streamSequence, 21)
})

test('non-finite: a failed micro-batch is reported whole, its slices are taken back', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  const key = { fleetEpoch: 1, step: 1, lease: 0, leaseAttempt: 1, slot: 0 }
  worker.advance({ kind: 'sliceReady', ...key, slice: 1, digest: digestOf(1) })
  const error = { code: 'NON_FINITE_GRADIENT', message: 'NaN' }
  const failed = { microBatch: 0, isChecked: false, error, tensor: 'lm_head' }
  worker.advance({ kind: 'microBatchFailed', ...key, ...failed })
  const failure = worker.told('failure')[0]
  assert.deepEqual([failure?.step, failure?.microBatch, failure?.tensor], [1, 0, 'lm_head'])
  assert.equal(worker.of('cancelContribution').length, 1)
  assert.deepEqual(worker.told('leaseDone'), [])
})

test('device: its failure is reported with the micro-batch, then the process makes way', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  const key = { fleetEpoch: 1, step: 1, lease: 0, leaseAttempt: 1, slot: 0 }
  const error = { code: 'DEVICE_FAILED', message: 'linear_forward failed: Xid' }
  const failed = { microBatch: 0, isChecked: true, error, tensor: '' }
  worker.advance({ kind: 'microBatchFailed', ...key, ...failed })
  const { step, microBatch, checked, error: told } = worker.told('failure')[0] ?? {}
  assert.deepEqual([step, microBatch, checked, told?.code], [1, 0, true, 'DEVICE_FAILED'])
  assert.deepEqual(worker.of('restart'), [{ kind: 'restart', reason: error.message }])
  assert.deepEqual(worker.told('leaseDone'), [])
})

test('device: a failure in an update, or of a lease that is void, ends the process as well', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  const error = { code: 'DEVICE_FAILED', message: 'Xid' }
  worker.advance({ kind: 'engineFailed', operation: 'applyUpdate', step: 1, error })
  const key = { fleetEpoch: 0, step: 1, lease: 0, leaseAttempt: 1, slot: 0 }
  const failed = { microBatch: 0, isChecked: false, error, tensor: '' }
  worker.advance({ kind: 'microBatchFailed', ...key, ...failed })
  assert.deepEqual(
    worker.told('failure').map(({ microBatch }) => microBatch),
    [-1, 0],
  )
  assert.equal(worker.of('restart').length, 2)
})

test('non-finite: a skipped step is applied without an update, its lease given up', () => {
  const worker = new WorkerFixture()
  worker.plan(1)
  worker.plan(2)
  worker.hear({
    commit: { jobId: 'job', fleetEpoch: 1, step: 1, streamSequence: 7, skipped: true },
  })
  assert.deepEqual(worker.of('applyUpdate'), [])
  const told = worker.told('applied')[0]
  assert.deepEqual([told?.step, told?.streamSequence], [1, 7])
  assert.equal(worker.last('computeMicroBatch')?.step, 2)
})
