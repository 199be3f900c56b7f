import assert from 'node:assert/strict'
import { test } from 'node:test'
import { jobHash, maxFrameBytes } from '../../proto/frame.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import { ExchangeBus } from './exchange-bus.js'
import {
  Crew,
  createExchange,
  fastClock,
  gradientLike,
  type TrialOptions,
} from './exchange-fixture.js'

const layout = { numBlocks: 57, sliceBlocks: 20, chunkBlocks: 7 }
const options: TrialOptions = { ...layout, significantBits: 24, numContributionSlots: 7 }
const numElements = layout.numBlocks * 256
const address = {
  jobHash: jobHash('job-1'),
  fleetEpoch: 1,
  step: 4,
  sliceAttempt: 0,
  leaseAttempt: 0,
}

async function filledBuffers(numContributions: number) {
  const trial = createExchange({ ...options, numContributionSlots: numContributions })
  const buffers = new ExchangeBuffers(trial)
  for (let slot = 0; slot < numContributions; slot++) {
    await buffers.clearSlot(slot)
    await trial.roundAndAdd(slot, gradientLike(numElements, slot + 1))
  }
  return { trial, buffers }
}

async function framesOf(buffers: ExchangeBuffers, slot: number, slice: number) {
  const chunks = Array.from({ length: buffers.numChunks(slice) }, (_, chunk) => chunk)
  const header = { ...address, slice, lease: slot }
  const sizes = await buffers.packContribution(slot, { header, chunks, frames: chunks })
  return sizes.map((bytes, slotOfFrame) => Uint8Array.from(buffers.frame(slotOfFrame, bytes)))
}

/**
 * Adds the contributions in `order`, each as frames or from its own slot, chunks turned by `turn`.
 */
async function sumIn(order: readonly number[], turn: number) {
  const { trial, buffers } = await filledBuffers(7)
  const finished = []
  for (let slice = 0; slice < buffers.numSlices; slice++) {
    await buffers.clearSum(slice)
    for (const [position, slot] of order.entries()) {
      if ((position + turn) % 3 === 0) await buffers.addOwnContribution(slot, slice)
      else {
        const frames = await framesOf(buffers, slot, slice)
        const turned = [
          ...frames.slice(turn % frames.length),
          ...frames.slice(0, turn % frames.length),
        ]
        await buffers.addContributionFrames(turned)
      }
    }
    finished.push(await buffers.finishSlice(address.step, slice))
  }
  return { finished, published: trial.published(address.step) }
}

test('exchange: any permutation and grouping of 7 contributions gives the same bits', async () => {
  const reference = await sumIn([0, 1, 2, 3, 4, 5, 6], 0)
  const orders = [
    [6, 5, 4, 3, 2, 1, 0],
    [3, 0, 6, 1, 5, 2, 4],
    [2, 4, 1, 6, 0, 3, 5],
  ]
  for (const [turn, order] of orders.entries()) {
    assert.deepEqual(await sumIn(order, turn + 1), reference)
  }
})

test('exchange: a doubled, missing, foreign or damaged chunk changes no sum', async () => {
  const { buffers } = await filledBuffers(2)
  await buffers.clearSum(1)
  const frames = await framesOf(buffers, 0, 1)
  const other = await framesOf(buffers, 1, 1)
  const damaged = frames.map((frame) => Uint8Array.from(frame))
  const last = damaged.at(-1) as Uint8Array
  last[200] = (last[200] ?? 0) ^ 16
  const attempts: Uint8Array[][] = [
    [...frames.slice(0, -1), frames[0] as Uint8Array],
    frames.slice(1),
    [...frames.slice(0, -1), other.at(-1) as Uint8Array],
    damaged,
    [],
  ]
  for (const attempt of attempts) {
    await assert.rejects(buffers.addContributionFrames(attempt), { code: 'FRAME_INVALID' })
  }
  assert.match(buffers.frameFault(last) ?? '', /checksum/)
  const [digest] = [await buffers.addContributionFrames(frames)]
  const digests = await buffers.contributionDigests(0)
  assert.equal(digest, digests[1])
  assert.equal((await buffers.finishSlice(4, 1)).sumDigest, digests[1])
})

test('exchange: 32767.99 passes; 32768 and non-finite poison the slot', async () => {
  const trial = createExchange(options)
  const buffers = new ExchangeBuffers(trial)
  const gradient = new Float32Array(numElements)
  gradient[5000] = 32767.99
  await buffers.clearSlot(0)
  await trial.roundAndAdd(0, gradient)
  for (const [value, code] of [
    [32768, 'GRADIENT_OUT_OF_RANGE'],
    [Number.NaN, 'NON_FINITE_GRADIENT'],
    [Number.NEGATIVE_INFINITY, 'NON_FINITE_GRADIENT'],
  ] as const) {
    gradient[5000] = value
    await assert.rejects(trial.roundAndAdd(1, gradient), { code })
    await assert.rejects(buffers.contributionDigests(1), { code: 'NON_FINITE_GRADIENT' })
    await buffers.clearSlot(1)
    await buffers.contributionDigests(1)
  }
  // Two contributions that fit make a sum that does not.
  gradient[5000] = 20000
  for (const slot of [2, 3]) await trial.roundAndAdd(slot, gradient)
  await buffers.clearSum(0)
  await buffers.addOwnContribution(2, 0)
  await assert.rejects(buffers.addOwnContribution(3, 0), { code: 'GRADIENT_OUT_OF_RANGE' })
})

test('exchange: impossible sizes are refused by name', () => {
  assert.throws(() => createExchange({ ...options, chunkBlocks: 512 }), { code: 'PLAN_MISMATCH' })
  assert.throws(() => createExchange({ ...options, numBlocks: 0 }), { code: 'PLAN_MISMATCH' })
  createExchange({ ...options, numBlocks: 600, sliceBlocks: 600, chunkBlocks: 511 })
})

/** One worker adding all leases itself: what every fleet must reproduce. */
async function alone(gradients: readonly Float32Array[], numBlocks: number) {
  const connect = () => Promise.reject(new Error('one worker alone opened a connection'))
  const crew = new Crew({ numWorkers: 1, numBlocks, connect }, gradients.length)
  crew.openEpoch(1)
  const digests = await crew.step(1, gradients)
  const published = crew.members[0]?.trial.published(1)
  await crew.close()
  return { digests, published }
}

for (const [name, faults] of Object.entries({
  'a quiet bus': { drop: 0, double: 0, reorder: 0, damage: 0 },
  'a bus that loses, doubles, reorders and damages': {
    drop: 0.05,
    double: 0.1,
    reorder: 0.3,
    damage: 0.05,
  },
})) {
  test(`exchange: 3 workers over ${name} get the bits of one worker alone`, async () => {
    const numBlocks = 1500
    const gradients = [1, 2, 3].map((seed) => gradientLike(numBlocks * 256, seed))
    const expected = await alone(gradients, numBlocks)
    const bus = new ExchangeBus(faults, 7)
    const connect = async (workerId: string) => bus.connection(workerId)
    const crew = new Crew({ numWorkers: 3, numBlocks, connect, clock: fastClock(10) })
    crew.openEpoch(1)
    for (const step of [1, 2, 3]) {
      assert.deepEqual(await crew.step(step, gradients), expected.digests)
      for (const { trial } of crew.members)
        assert.deepEqual(trial.published(step), expected.published)
    }
    const refused = crew.members.reduce((sum, { plane }) => sum + plane.counts.framesRefused, 0)
    assert.equal(refused, bus.numDamaged)
    assert.equal(bus.numDamaged > 0, faults.damage > 0)
    await crew.close()
  })
}

test('exchange: an owner grants at most 16 MiB at a time, whoever offers', async () => {
  const big = { numBlocks: 4 * 2000, sliceBlocks: 4000, chunkBlocks: 511 }
  const bus = new ExchangeBus()
  const connect = async (workerId: string) => bus.connection(workerId)
  const crew = new Crew({ numWorkers: 7, numBlocks: big.numBlocks, layout: big, connect })
  crew.openEpoch(1)
  const gradients = [1, 2, 3, 4, 5, 6, 7].map((seed) => gradientLike(big.numBlocks * 256, seed))
  await crew.step(1, gradients)
  const peaks = crew.members.map(({ plane }) => plane.counts.peakStagedBytes)
  assert.ok(Math.max(...peaks) <= 16 * maxFrameBytes, `peaks ${peaks}`)
  assert.ok(Math.max(...peaks) > 8 * maxFrameBytes, `the limit was not met: ${peaks}`)
  await crew.close()
})
