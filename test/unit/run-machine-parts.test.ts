import assert from 'node:assert/strict'
import { test } from 'node:test'
import { learningRateTable } from '../../coordinator/learning-rate.js'
import { planLeases, planOwners } from '../../coordinator/lease-plan.js'
import { defaultRunLimits } from '../../coordinator/run-events.js'
import { addDigests, updateNumbers } from '../../coordinator/update-numbers.js'
import { DataOrder, emptyPack } from '../../proto/data-order.js'
import { chunkRange, numChunks, planSlices, sliceRange } from '../../proto/slices.js'
import { RunFixture } from './run-machine-fixture.js'

test('planner: 3 workers of speeds 4:2:1 share 64 micro-batches 37:18:9, end within one', () => {
  const all = Array.from({ length: 64 }, (_, index) => index)
  const workers = [4, 2, 1].map((speed, index) => ({ workerId: `w${index}`, speed }))
  const leases = planLeases(all, workers)
  assert.deepEqual(
    leases.map((lease) => lease.microBatches.length),
    [37, 18, 9],
  )
  assert.deepEqual(
    leases.flatMap((lease) => lease.microBatches),
    all,
  )
  // All finish within one micro-batch of each other, as the slowest computes it.
  const times = leases.map(({ microBatches }, index) => {
    return microBatches.length / (workers[index]?.speed ?? 0)
  })
  assert.ok(Math.max(...times) - Math.min(...times) <= 1)
})

test('planner: a worker that is not yet measured counts as the mean of the others', () => {
  const workers = [4, 0, 2].map((speed, index) => ({ workerId: `w${index}`, speed }))
  const all = Array.from({ length: 9 }, (_, index) => index)
  const counts = planLeases(all, workers).map((lease) => lease.microBatches.length)
  assert.deepEqual(counts, [4, 3, 2])
})

test('planner: more workers than micro-batches leaves the slowest without a lease', () => {
  const workers = [1, 4, 4].map((speed, index) => ({ workerId: `w${index}`, speed }))
  assert.deepEqual(planLeases([0, 1], workers), [
    { workerId: 'w1', microBatches: [0] },
    { workerId: 'w2', microBatches: [1] },
  ])
})

test('planner: slices are owned round robin, so that counts differ by at most one', () => {
  assert.deepEqual(planOwners(5, ['w1', 'w2']), ['w1', 'w2', 'w1', 'w2', 'w1'])
})

test('data order: each data epoch sees every pack once, empty packs fill the tail', () => {
  const order = new DataOrder({
    seed: 2 ** 40 + 7,
    numPacks: 23,
    packsPerMicroBatch: 3,
    microBatchesPerStep: 3,
    numEpochs: 2,
    maxSteps: null,
    explicitOrder: null,
  })
  assert.equal(order.numSteps, 6)
  for (const first of [1, 4]) {
    const packs = [0, 1, 2].flatMap((offset) =>
      Array.from({ length: order.numMicroBatches(first + offset) }, (_, index) =>
        order.microBatchPacks(first + offset, index),
      ).flat(),
    )
    assert.equal(packs.filter((pack) => pack === emptyPack).length, 1)
    const real = packs.filter((pack) => pack !== emptyPack).sort((a, b) => a - b)
    assert.deepEqual(
      real,
      Array.from({ length: 23 }, (_, pack) => pack),
    )
  }
  assert.notDeepEqual(order.microBatchPacks(1, 0), order.microBatchPacks(4, 0))
})

test('slices: ranges and chunks cover every block once', () => {
  const layout = planSlices(1_003)
  let next = 0
  for (let slice = 0; next < 1_003; slice++) {
    assert.equal(sliceRange(layout, slice).firstBlock, next)
    for (let chunk = 0; chunk < numChunks(layout, slice); chunk++) {
      const range = chunkRange(layout, slice, chunk)
      assert.equal(range.firstBlock, next)
      next += range.numBlocks
    }
  }
  assert.equal(next, 1_003)
})

test('update: clipping and bias corrections as float32, no clipping at 0', () => {
  const input = { sumSquares: [9, 16], maxGradNorm: 1, learningRate: 1e-3, updateNumber: 1 }
  const update = updateNumbers({ ...input, beta1: 0.9, beta2: 0.999 })
  assert.equal(update.gradNorm, 5)
  assert.equal(update.clipFactor, Math.fround(1 / (5 + 1e-6)))
  assert.equal(update.biasCorrection1, Math.fround(1 - 0.9))
  assert.equal(updateNumbers({ ...input, maxGradNorm: 0, beta1: 0.9, beta2: 0.999 }).clipFactor, 1)
})

test('digests add modulo 2^64', () => {
  assert.equal(addDigests(['ffffffffffffffff', '0000000000000002']), '0000000000000001')
})

test('learning rate: linear with warm-up follows the Hugging Face formula', () => {
  const options = { learningRate: 1, numSteps: 4, warmupSteps: 2, warmupRatio: 0 }
  assert.deepEqual(learningRateTable({ ...options, schedule: 'linear' }), [0, 0.5, 1, 0.5])
  assert.deepEqual(learningRateTable({ ...options, schedule: 'constant' }), [1, 1, 1, 1])
})

/** Heartbeats of a worker that fetches a model: each tells `step` bytes more than the last. */
function prepareFor(ms: number, step: number): string[] {
  const limits = { ...defaultRunLimits, joinStageMs: 3_000 }
  const fixture = new RunFixture({ config: { limits } })
  const worker = {
    workerId: 'w-1',
    identity: 'host 1',
    deviceClass: 'cpu',
    host: 'host',
    device: 'cpu',
  }
  fixture.advance({ kind: 'workerAttached', worker: { ...worker, precisions: ['fp32'] } })
  for (let waitedMs = 0, progressBytes = 0; waitedMs < ms; waitedMs += 250) {
    fixture.say('w-1', { heartbeat: { progressBytes } })
    fixture.tick(250)
    progressBytes += step
  }
  return fixture.disconnected
}

test('prepare: one whose files move is waited for beyond the limit; one that stands is not', () => {
  assert.deepEqual(prepareFor(10_000, 1_000), [])
  assert.deepEqual(prepareFor(10_000, 0), ['w-1'])
})
