import assert from 'node:assert/strict'
import { test } from 'node:test'
import { untoldSteps } from '../../coordinator/untold-steps.js'
import type { CommitRecord, LoggedRecord, SkipRecord } from '../../proto/commit-record.js'

const author = { coordinatorId: 'c', appendNumber: 1, fleetEpoch: 1 }
const commit = (step: number, timeMs: number): CommitRecord => ({
  kind: 'commit',
  ...author,
  step,
  timeMs,
  slices: [],
  leases: [{ lease: 0, leaseAttempt: 1, workerId: 'w', deviceClass: 'd', microBatches: [0, 1, 2] }],
  update: {
    learningRate: 0.5,
    clipFactor: 1,
    biasCorrection1: 1,
    biasCorrection2Sqrt: 1,
    gradNorm: 3,
  },
  lossSum: 8,
  lossDivisor: 4,
  numTargetTokens: 4,
  numTokens: 100,
})

test('a commit without an event gets one; steps told or rolled back get none', () => {
  const rollback = { kind: 'rollback' as const, ...author, timeMs: 0, fromStep: 3, toStep: 2 }
  const records = [
    commit(1, 1_000),
    commit(2, 1_500),
    commit(3, 1_900),
    { ...rollback, reason: '' },
  ]
  const log: LoggedRecord[] = records.map((record, index) => ({ sequence: index + 1, record }))
  const options = { log, numSteps: 12, dataEpochsThrough: (step: number) => step / 4 }
  assert.deepEqual(untoldSteps({ ...options, told: new Set([1, 2]) }), [])
  const [event, ...others] = untoldSteps({ ...options, told: new Set([1]) })
  assert.deepEqual(others, [])
  assert.equal(event?.step?.step, 2)
  assert.equal(event?.step?.loss, 2)
  assert.equal(event?.step?.stepMs, 500)
  assert.equal(event?.step?.tokensPerSecond, 200)
  assert.deepEqual(event?.step?.shares, [{ workerId: 'w', numMicroBatches: 3 }])
})

test('a skipped step without an event gets one that says why; one that was told gets none', () => {
  const skip: SkipRecord = {
    kind: 'skip',
    ...author,
    step: 2,
    timeMs: 1_500,
    microBatch: 1,
    tensor: 'lm_head.weight',
    reason: 'NaN',
  }
  const log = [commit(1, 1_000), skip].map((record, index) => ({ sequence: index + 1, record }))
  const options = { log, numSteps: 12, dataEpochsThrough: (step: number) => step / 4 }
  assert.deepEqual(untoldSteps({ ...options, told: new Set([1]) }), [
    {
      stepSkipped: {
        step: 2,
        numSteps: 12,
        dataEpoch: 0.5,
        fleetEpoch: 1,
        microBatch: 1,
        tensor: 'lm_head.weight',
        reason: 'NaN',
      },
    },
  ])
  assert.deepEqual(untoldSteps({ ...options, told: new Set([1, 2]) }), [])
})
