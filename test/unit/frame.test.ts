import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  decodeCredit,
  encodeCredit,
  frameHeaderBytes,
  isFrame,
  jobHash,
  readFrameHeader,
  writeFrameHeader,
} from '../../proto/frame.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import { createExchange, gradientLike } from './exchange-fixture.js'

const layout = { numBlocks: 90, sliceBlocks: 40, chunkBlocks: 16 }

/** Two numbers of each width apart, so that a swapped or shifted field shows. */
const address = {
  jobHash: jobHash('job-of-the-frame-test'),
  fleetEpoch: 0x01020304,
  step: 0x05060708,
  slice: 1,
  sliceAttempt: 0x090a,
  lease: 0x0b0c,
  leaseAttempt: 0x0d0e,
}

async function nativeFrame() {
  const trial = createExchange({ ...layout, significantBits: 12, numContributionSlots: 1 })
  const buffers = new ExchangeBuffers(trial)
  await buffers.clearSlot(0)
  await trial.roundAndAdd(0, gradientLike(layout.numBlocks * 256, 5))
  const order = { header: address, chunks: [2], frames: [0] }
  const [bytes = 0] = await buffers.packContribution(0, order)
  return { buffers, frame: Uint8Array.from(buffers.frame(0, bytes)) }
}

test('frame: the native header and the one described in proto are the same 64 bytes', async () => {
  const { buffers, frame } = await nativeFrame()
  const { digest, crc32c, payloadBytes, ...fields } = readFrameHeader(frame)
  assert.deepEqual(fields, {
    ...address,
    kind: 'contribution',
    codec: 'q12',
    chunk: 2,
    numChunks: 3,
    firstBlock: 40 + 2 * 16,
    numBlocks: 8,
  })
  const copy = Uint8Array.from(frame).fill(0, 0, frameHeaderBytes)
  writeFrameHeader({ ...fields, digest, crc32c, payloadBytes }, copy)
  assert.deepEqual(copy, frame)
  assert.equal(buffers.frameFault(copy), null)
})

test('frame: 10,000 flipped bits and 10,000 random frames are all refused', async () => {
  const { buffers, frame } = await nativeFrame()
  let state = 12345
  const random = (below: number) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return Math.floor((state / 2 ** 32) * below)
  }
  for (let i = 0; i < 10_000; i++) {
    const at = random(frame.byteLength)
    const mask = 1 << random(8)
    frame[at] = (frame[at] ?? 0) ^ mask
    assert.notEqual(buffers.frameFault(frame), null, `bit flipped in byte ${at}`)
    frame[at] = (frame[at] ?? 0) ^ mask
  }
  for (let i = 0; i < 10_000; i++) {
    const noise = Uint8Array.from({ length: random(500) }, () => random(256))
    noise.set(frame.subarray(0, Math.min(random(64), noise.byteLength)))
    assert.notEqual(buffers.frameFault(noise), null)
  }
  assert.equal(buffers.frameFault(frame), null)
})

test('frame: a header is read only with right magic, version, kind, codec, length', async () => {
  const { frame } = await nativeFrame()
  const changed = (at: number, value: number) => {
    const copy = Uint8Array.from(frame)
    copy[at] = value
    return copy
  }
  for (const bad of [
    frame.subarray(0, 63),
    frame.subarray(0, -1),
    changed(0, 0x55),
    changed(4, 2),
    changed(6, 3),
    changed(7, 0),
    changed(44, 1),
  ]) {
    assert.throws(() => readFrameHeader(bad), { code: 'FRAME_INVALID' })
  }
  assert.ok(isFrame(frame))
})

test('frame: a credit message survives the wire; anything else is no message', () => {
  const key = { step: 3, slice: 2, sliceAttempt: 1, lease: 5, leaseAttempt: 0 }
  const offer = { kind: 'offer', from: 'w-1', numChunks: 4, bytes: 70_000, ...key } as const
  assert.deepEqual(decodeCredit(encodeCredit(offer)), offer)
  const need = { kind: 'need' as const, from: 'w-1', chunks: [0, 3], ...key }
  assert.deepEqual(decodeCredit(encodeCredit(need)), need)
  assert.ok(!isFrame(encodeCredit(offer)))
  for (const bad of [
    'nonsense',
    '{"kind":"offer","from":"w-1"}',
    JSON.stringify({ ...need, chunks: ['1'] }),
    JSON.stringify({ ...offer, step: -1 }),
    JSON.stringify({ ...offer, kind: 'toString' }),
    JSON.stringify({ ...offer, from: 7 }),
    'null',
  ]) {
    assert.equal(decodeCredit(new TextEncoder().encode(bad)), null, bad)
  }
})
