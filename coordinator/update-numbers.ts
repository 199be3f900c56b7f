/**
 * The numbers of one optimizer update, computed once by the coordinator and sent as float32 bits,
 * so that every replica uses the same (DESIGN: optimizer specified to the bit).
 */
import type { CommitRecord } from '../proto/commit-record.js'

export interface UpdateInput {
  /** Sum of squares of each slice's published values, slice 0 first. */
  sumSquares: readonly number[]
  /** 0: no clipping. */
  maxGradNorm: number
  learningRate: number
  /** Updates applied so far, this one included: the exponent of the bias corrections. */
  updateNumber: number
  beta1: number
  beta2: number
}

export function updateNumbers(input: UpdateInput): CommitRecord['update'] {
  // Slices in order: the one order of summation that every coordinator uses.
  let sum = 0
  for (const sumSquares of input.sumSquares) sum += sumSquares
  const gradNorm = Math.sqrt(sum)
  const clip = input.maxGradNorm > 0 ? Math.min(1, input.maxGradNorm / (gradNorm + 1e-6)) : 1
  return {
    learningRate: Math.fround(input.learningRate),
    clipFactor: Math.fround(clip),
    biasCorrection1: Math.fround(1 - power(input.beta1, input.updateNumber)),
    biasCorrection2Sqrt: Math.fround(Math.sqrt(1 - power(input.beta2, input.updateNumber))),
    gradNorm,
  }
}

/** By squaring: Math.pow may differ in the last bit between engines, multiplication does not. */
function power(base: number, exponent: number): number {
  let result = 1
  let square = base
  for (let rest = exponent; rest > 0; rest = Math.floor(rest / 2)) {
    if (rest % 2 === 1) result *= square
    square *= square
  }
  return result
}

/** Sum modulo 2^64 of linear digests, each 16 hex digits. */
export function addDigests(digests: Iterable<string>): string {
  let sum = 0n
  for (const digest of digests) sum += BigInt(`0x${digest}`)
  return BigInt.asUintN(64, sum).toString(16).padStart(16, '0')
}
