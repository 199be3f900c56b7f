/**
 * An engine whose gradient is a hash of (weights, micro-batch): a step that counts a micro-batch
 * twice, not at all, or from other weights ends in other weights. One 64-bit number a slice;
 * integers add modulo 2^64, as the real accumulators do.
 */
import type { UpdateNumbers } from '../../worker/engine.js'

export interface ToyWeights {
  slices: bigint[]
}

export const startWeights = (numSlices: number): ToyWeights => ({
  slices: Array.from({ length: numSlices }, (_, slice) => hash(1n, BigInt(slice))),
})

export const weightsDigest = (weights: ToyWeights): string =>
  hex(weights.slices.reduce((digest, value) => hash(digest, value), 7n))

/** Other `bits` give others: of a device class, as another GPU model would, or of a computation. */
export function gradient(weights: ToyWeights, packs: readonly number[], bits: string): bigint[] {
  let work = hash(5n, BigInt(bits.length))
  for (const char of bits) work = hash(work, BigInt(char.charCodeAt(0)))
  for (const value of weights.slices) work = hash(work, value)
  for (const pack of packs) work = hash(work, BigInt(pack + 1))
  return weights.slices.map((_, slice) => hash(work, BigInt(slice)))
}

export const addWrapped = (a: bigint, b: bigint): bigint => BigInt.asUintN(64, a + b)

/** Linear: the digest of a sum is the sum of the digests. */
export const linearDigest = (value: bigint, slice: number): string =>
  hex(BigInt.asUintN(64, value * (hash(99n, BigInt(slice)) | 1n)))

/** Rounding of a sum to what is published. */
export const published = (sum: bigint): bigint => (sum >> 20n) << 20n
export const publishedDigest = (value: bigint, slice: number): string =>
  hex(hash(value, BigInt(slice)))
export const sumSquares = (value: bigint): number => Number(value >> 40n) / 2 ** 24

export const lossSum = (packs: readonly number[]): number =>
  packs.reduce((sum, pack) => sum + (pack < 0 ? 0 : Math.sqrt(pack + 2)), 0)

export function applyUpdate(
  weights: ToyWeights,
  gradients: readonly bigint[],
  update: UpdateNumbers,
): ToyWeights {
  const bits = [
    update.learningRate,
    update.clipFactor,
    update.biasCorrection1,
    update.biasCorrection2Sqrt,
  ].reduce((digest, value) => hash(digest, float32Bits(value)), 3n)
  return {
    slices: weights.slices.map((value, slice) =>
      hash(hash(value, gradients[slice] as bigint), bits),
    ),
  }
}

const float32Bits = (value: number): bigint =>
  BigInt(new Uint32Array(new Float32Array([value]).buffer)[0] as number)

/** splitmix64's finalizer over a combination of both. */
function hash(a: bigint, b: bigint): bigint {
  let z = BigInt.asUintN(64, a * 0x9e3779b97f4a7c15n + b + 0x632be59bd9b4e019n)
  z = BigInt.asUintN(64, (z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n)
  z = BigInt.asUintN(64, (z ^ (z >> 27n)) * 0x94d049bb133111ebn)
  return z ^ (z >> 31n)
}

const hex = (value: bigint): string => value.toString(16).padStart(16, '0')
