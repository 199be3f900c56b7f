/**
 * Which packs a micro-batch has: a pure function of the seed and the data's size, so that every
 * coordinator, now or after a restart, plans the same steps. proto/PROTOCOL.md §2.
 *
 * Steps count from 1. A data epoch permutes all packs and cuts them into micro-batches, these into
 * steps; the last step of a data epoch has fewer micro-batches, its last micro-batch is filled with
 * empty packs (index -1).
 */
import { TunemeshError } from './errors.js'

export interface DataOrderOptions {
  seed: number
  numPacks: number
  packsPerMicroBatch: number
  microBatchesPerStep: number
  /** May be a fraction, as in TrainingArguments. */
  numEpochs: number
  /** Overrides numEpochs where set. */
  maxSteps: number | null
  /**
   * Pack of each place of the run, steps one after another, each with the full number of places
   * (golden runs); null: the order of the seed.
   */
  explicitOrder: readonly number[] | null
}

export const emptyPack = -1

export class DataOrder {
  readonly stepsPerEpoch: number
  readonly microBatchesPerEpoch: number
  readonly numSteps: number
  /** The permutation in use: asked for step after step, so one is enough. */
  private cached: { dataEpoch: number; order: Uint32Array } | null = null

  constructor(readonly options: DataOrderOptions) {
    const { numPacks, packsPerMicroBatch, microBatchesPerStep } = options
    for (const [name, value] of Object.entries({
      numPacks,
      packsPerMicroBatch,
      microBatchesPerStep,
    })) {
      if (!Number.isInteger(value) || value < 1) {
        throw new TunemeshError('DATA_EMPTY', `${name} is ${value}; training needs at least 1`)
      }
    }
    this.microBatchesPerEpoch = Math.ceil(numPacks / packsPerMicroBatch)
    this.stepsPerEpoch = Math.ceil(this.microBatchesPerEpoch / microBatchesPerStep)
    this.numSteps = options.maxSteps ?? Math.ceil(options.numEpochs * this.stepsPerEpoch)
  }

  /** Data epoch of a step, from 0. */
  dataEpochOf(step: number): number {
    return Math.floor((step - 1) / this.stepsPerEpoch)
  }

  /** Passes over the data once the step is committed, as a fraction. */
  dataEpochsThrough(step: number): number {
    return step / this.stepsPerEpoch
  }

  numMicroBatches(step: number): number {
    if (this.options.explicitOrder) return this.options.microBatchesPerStep
    const first = this.firstMicroBatch(step)
    return Math.min(this.options.microBatchesPerStep, this.microBatchesPerEpoch - first)
  }

  /** Packs of a micro-batch, in order; -1 is an empty pack. */
  microBatchPacks(step: number, index: number): number[] {
    if (index < 0 || index >= this.numMicroBatches(step)) {
      throw new TunemeshError(
        'INTERNAL',
        `step ${step} has no micro-batch ${index}: it has ${this.numMicroBatches(step)}`,
      )
    }
    const { packsPerMicroBatch, microBatchesPerStep, numPacks, explicitOrder } = this.options
    if (explicitOrder) {
      const first = ((step - 1) * microBatchesPerStep + index) * packsPerMicroBatch
      return Array.from(
        { length: packsPerMicroBatch },
        (_, offset) => explicitOrder[first + offset] ?? emptyPack,
      )
    }
    const order = this.permutation(this.dataEpochOf(step))
    const first = (this.firstMicroBatch(step) + index) * packsPerMicroBatch
    return Array.from({ length: packsPerMicroBatch }, (_, offset) =>
      first + offset < numPacks ? (order[first + offset] as number) : emptyPack,
    )
  }

  private firstMicroBatch(step: number): number {
    return ((step - 1) % this.stepsPerEpoch) * this.options.microBatchesPerStep
  }

  private permutation(dataEpoch: number): Uint32Array {
    if (this.cached?.dataEpoch !== dataEpoch) {
      const { seed, numPacks } = this.options
      const order = Uint32Array.from({ length: numPacks }, (_, pack) => pack)
      shuffle(order, randomWords(seed, dataEpoch))
      this.cached = { dataEpoch, order }
    }
    return this.cached.order
  }
}

/** Fisher-Yates from the end; a draw below n is word mod n, words that would bias it refused. */
function shuffle(order: Uint32Array, nextWord: () => number): void {
  for (let last = order.length - 1; last > 0; last--) {
    const n = last + 1
    const limit = 2 ** 32 - (2 ** 32 % n)
    let word = nextWord()
    while (word >= limit) word = nextWord()
    const chosen = word % n
    const kept = order[last] as number
    order[last] = order[chosen] as number
    order[chosen] = kept
  }
}

/**
 * 32-bit words of sfc32 (C. Doty-Humphrey, PractRand), its state seeded with the low and high half
 * of the seed, the data epoch and 1, the first 15 words dropped.
 */
function randomWords(seed: number, dataEpoch: number): () => number {
  let a = seed >>> 0
  let b = Math.floor(seed / 2 ** 32) >>> 0
  let c = dataEpoch >>> 0
  let counter = 1
  const next = () => {
    const word = (((a + b) >>> 0) + counter) >>> 0
    counter = (counter + 1) >>> 0
    a = b ^ (b >>> 9)
    b = (c + (c << 3)) >>> 0
    c = (((c << 21) | (c >>> 11)) + word) >>> 0
    return word
  }
  for (let warm = 0; warm < 15; warm++) next()
  return next
}
