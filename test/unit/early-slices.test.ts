/** Slices of a contribution leave while backward goes on: engine, machines, what a commit needs. */
import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  divergedSlices,
  isComplete,
  isUnprovable,
  newStepRun,
  owesLeaseDone,
  recordLeaseDone,
  recordSliceDone,
  repair,
} from '../../coordinator/step-run.js'
import type { LeaseDone__Output } from '../../proto/gen/tunemesh/v1/LeaseDone.js'
import type { SliceDone__Output } from '../../proto/gen/tunemesh/v1/SliceDone.js'
import type { ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import type { ContributionSlice } from '../../worker/engine.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { WorkerRunMachine } from '../../worker/run-machine.js'
import { goldenBatch, goldenEngine, goldenLora, isPresent } from './engine-fixture.js'

const family = 'llama-tied'
const withGolden = { skip: isPresent(family) ? false : `test/golden/${family} is absent` }

test(
  'engine: every slice is told before the micro-batch ends, the last layers first',
  withGolden,
  async () => {
    const engine = await goldenEngine(family)
    const { tensors } = await engine.prepare({ ...goldenLora, sliceBlocks: 8, chunkBlocks: 4 })
    const exchange = new ExchangeBuffers(engine.exchangeHandle)
    await exchange.clearSlot(0)
    await engine.microBatch(goldenBatch(family, 0), 100, { slot: 0 })
    const told: ContributionSlice[] = []
    let isOver = false
    const onSlice = (slice: ContributionSlice) => {
      assert.equal(isOver, false)
      told.push(slice)
    }
    await engine.microBatch(goldenBatch(family, 1), 100, { slot: 0, onSlice })
    isOver = true
    const { numSlices } = exchange
    assert.ok(numSlices > 6)
    assert.deepEqual(
      told.map(({ slice }) => slice).sort((a, b) => a - b),
      Array.from({ length: numSlices }, (_, slice) => slice),
    )
    const layers = told.map(({ slice }) => {
      const first = tensors.filter(({ firstBlock }) => firstBlock <= slice * 8).at(-1)
      return Number(/layers\.(\d+)\./.exec(first?.name ?? '')?.[1])
    })
    assert.deepEqual(
      layers,
      layers.slice().sort((a, b) => b - a),
    )
    // Rounded and measured as a whole, by an engine to which nobody listens.
    const silent = await goldenEngine(family)
    await silent.prepare({ ...goldenLora, sliceBlocks: 8, chunkBlocks: 4 })
    const whole = new ExchangeBuffers(silent.exchangeHandle)
    await whole.clearSlot(0)
    for (const index of [0, 1]) {
      await silent.microBatch(goldenBatch(family, index), 100, { slot: 0 })
    }
    const digests = await whole.contributionDigests(0)
    for (const { slice, digest, packedBytes } of told) {
      assert.equal(digest, digests[slice])
      assert.equal(packedBytes, whole.packedBytes(0, slice))
    }
    await silent.close()
    await engine.close()
  },
)

test(
  'engine: a last micro-batch of empty packs tells every slice as it stands',
  withGolden,
  async () => {
    const engine = await goldenEngine(family)
    await engine.prepare(goldenLora)
    const exchange = new ExchangeBuffers(engine.exchangeHandle)
    await exchange.clearSlot(0)
    await engine.microBatch(goldenBatch(family, 0), 100, { slot: 0 })
    const told = new Map<number, string>()
    const empty = {
      tokens: new Int32Array(0),
      targets: new Int32Array(0),
      documentStarts: Int32Array.from([0]),
    }
    const onSlice = ({ slice, digest }: ContributionSlice) => told.set(slice, digest)
    await engine.microBatch(empty, 100, { slot: 0, onSlice })
    const digests = await exchange.contributionDigests(0)
    assert.equal(told.size, digests.length)
    for (const [slice, digest] of told) assert.equal(digest, digests[slice])
    await engine.close()
  },
)

// ---- the worker's machine ----

const jobId = 'job'
const fleetEpoch = 1

/** A worker of two whose lease of step 1 is being computed; it owns slice 0, the other the rest. */
function computing() {
  const machine = new WorkerRunMachine({
    workerId: 'w1',
    numContributionSlots: 2,
    doubtAfterMs: 1_000,
    requestSumEveryMs: 100,
  })
  const advance = (event: WorkerEvent) => machine.advance(event, 0)
  const hear = (message: object) =>
    advance({ kind: 'message', message: message as ToWorker__Output })
  hear({ prepare: { jobId, sliceBlocks: 1 } })
  advance({
    kind: 'enginePrepared',
    planHash: '',
    memory: {},
    numBlocks: 3,
    numTrainedParameters: 768,
    weightsSha256: '',
    deviceClass: 'cpu',
  })
  hear({ message: 'epoch', epoch: { jobId, fleetEpoch, workerIds: ['w1', 'w2'] } })
  const effects = hear({
    message: 'stepPlan',
    stepPlan: {
      jobId,
      fleetEpoch,
      step: 1,
      revision: 1,
      leases: [{ lease: 0, leaseAttempt: 1, workerId: 'w1', microBatches: [0, 1], onlySlices: [] }],
      owners: ['w1', 'w2', 'w2'].map((workerId, slice) => ({ slice, sliceAttempt: 1, workerId })),
      lossDivisor: 1,
      microBatches: [0, 1].map((microBatch) => ({ microBatch, packs: [microBatch] })),
    },
  })
  const key = { fleetEpoch, step: 1, lease: 0, leaseAttempt: 1, slot: 0 }
  const losses = { lossSum: 1, numTargetTokens: 1, numTokens: 1, computeMs: 1 }
  return {
    effects,
    ready: (slice: number) => advance({ kind: 'sliceReady', ...key, slice, digest: `d${slice}` }),
    done: (microBatch: number) =>
      advance({ kind: 'microBatchDone', ...key, ...losses, microBatch }),
    failed: () =>
      advance({
        kind: 'microBatchFailed',
        ...key,
        microBatch: 1,
        isChecked: false,
        error: { code: 'NON_FINITE_GRADIENT', message: 'NaN' },
        tensor: 'first',
      }),
  }
}

const namesOf = (effects: WorkerEffect[]) =>
  effects.map((effect) =>
    effect.kind === 'send' ? Object.keys(effect.message).join() : effect.kind,
  )

test('worker: a slice is sent and counted when it stands, LeaseDone follows', () => {
  const worker = computing()
  const isLast = (effects: WorkerEffect[]) =>
    effects.flatMap((effect) => (effect.kind === 'computeMicroBatch' ? [effect.isLast] : []))
  assert.deepEqual(isLast(worker.effects), [false])
  assert.deepEqual(isLast(worker.done(0)), [true])
  const [sent] = worker.ready(2)
  assert.ok(sent?.kind === 'sendContribution')
  assert.deepEqual([sent.slice, sent.ownerWorkerId, sent.digest], [2, 'w2', 'd2'])
  assert.deepEqual(namesOf(worker.ready(1)), ['sendContribution'])
  assert.deepEqual(namesOf(worker.ready(0)), ['countContribution', 'finishSlice'])
  const [done] = worker.done(1)
  assert.ok(done?.kind === 'send')
  assert.deepEqual(
    done.message.leaseDone?.digests?.map(({ slice, digest }) => [slice, digest]),
    [
      [2, 'd2'],
      [1, 'd1'],
      [0, 'd0'],
    ],
  )
})

test('worker: a gradient that fails later takes back what is under way; no LeaseDone', () => {
  const worker = computing()
  worker.done(0)
  worker.ready(2)
  assert.deepEqual(namesOf(worker.failed()), ['cancelContribution', 'failure'])
  assert.deepEqual(namesOf(worker.ready(1)), [])
})

// ---- the coordinator's step ----

const classes: Record<string, string> = { w1: 'a', w2: 'a', w3: 'b' }
const live = (...ids: string[]) =>
  ids.map((workerId) => ({ workerId, deviceClass: classes[workerId] ?? '' }))

/** Lease 0 on w1, whose only slice its owner w2 has summed before LeaseDone. */
function summedEarly() {
  const run = newStepRun(
    {
      step: 1,
      fleetEpoch,
      lossDivisor: 1,
      isDeterministic: true,
      leases: [{ workerId: 'w1', microBatches: [0], deviceClass: '' }],
      owners: ['w2'],
      committed: null,
      nowMs: 0,
    },
    (id) => classes[id] ?? '',
  )
  const counted = [{ lease: 0, leaseAttempt: 1 }]
  const done = { slice: 0, sliceAttempt: 1, sumDigest: '0000000000000007', counted }
  assert.ok(recordSliceDone(run, 'w2', done as unknown as SliceDone__Output))
  const leaseDone = (workerId: string, leaseAttempt: number, digest = '0000000000000007') =>
    recordLeaseDone(run, workerId, {
      lease: 0,
      leaseAttempt,
      losses: [],
      digests: [{ slice: 0, digest }],
    } as unknown as LeaseDone__Output)
  const [slice] = run.slices
  assert.ok(slice)
  return { run, slice, leaseDone }
}

test('coordinator: a sum is no step before some attempt of every lease is done', () => {
  const { run, leaseDone } = summedEarly()
  assert.equal(isComplete(run), false)
  assert.equal(owesLeaseDone(run, live('w1', 'w2'))?.workerId, 'w1')
  assert.ok(leaseDone('w1', 1))
  assert.equal(isComplete(run), true)
  assert.equal(owesLeaseDone(run, live('w1', 'w2')), undefined)
  assert.deepEqual(divergedSlices(run), [])
})

test('coordinator: the sum of an attempt that died is proved by one of its class only', () => {
  const successors = [
    ['w2', 'w3'],
    ['w3', 'w2'],
  ] as const
  for (const [successor, other] of successors) {
    const { run, slice, leaseDone } = summedEarly()
    for (const { attempts } of run.leases) for (const attempt of attempts) attempt.isHeld = false
    assert.equal(repair(run, live(successor, other)), true)
    const again = run.leases[0]?.attempts.at(-1)
    assert.deepEqual([again?.leaseAttempt, again?.workerId], [2, successor])
    assert.equal(isUnprovable(run, slice), true)
    assert.ok(leaseDone(successor, 2))
    // Nobody owes anything any more; w3's digest says nothing about the bits of w1.
    assert.equal(owesLeaseDone(run, live(successor, other)), undefined)
    const isProved = successor === 'w2'
    assert.equal(isUnprovable(run, slice), !isProved)
    assert.deepEqual(divergedSlices(run), isProved ? [] : [slice])
  }
})
