/**
 * The undisturbed run: one worker, every micro-batch in order. Every disturbed run must equal it.
 */

import { learningRateTable } from '../../coordinator/learning-rate.js'
import { defaultRunLimits, type RunConfig } from '../../coordinator/run-events.js'
import { updateNumbers } from '../../coordinator/update-numbers.js'
import { DataOrder } from '../../proto/data-order.js'
import type { SimulationOptions } from './options.js'
import * as toy from './toy-engine.js'

export interface ReferenceRun {
  numSteps: number
  /** Weights after each step, the start first. */
  digests: string[]
  /** Digest of each slice's published sum, by step. */
  published: string[][]
}

const dataOrder = (options: SimulationOptions): RunConfig['dataOrder'] => ({
  seed: options.seed,
  numPacks: options.numPacks,
  packsPerMicroBatch: options.packsPerMicroBatch,
  microBatchesPerStep: options.microBatchesPerStep,
  numEpochs: options.numEpochs,
  maxSteps: Math.min(
    14,
    options.numEpochs *
      Math.ceil(
        Math.ceil(options.numPacks / options.packsPerMicroBatch) / options.microBatchesPerStep,
      ),
  ),
  explicitOrder: null,
})

export function configFor(options: SimulationOptions, coordinatorId: string): RunConfig {
  const order = new DataOrder(dataOrder(options))
  return {
    jobId: 'job',
    coordinatorId,
    dataOrder: dataOrder(options),
    targetsPerPack: Array.from({ length: options.numPacks }, (_, pack) => pack + 1),
    tokensPerPack: Array.from({ length: options.numPacks }, () => 64),
    learningRates: learningRateTable({
      schedule: 'linear',
      learningRate: 1e-3,
      numSteps: order.numSteps,
      warmupSteps: 1,
      warmupRatio: 0,
    }),
    beta1: 0.9,
    beta2: 0.999,
    maxGradNorm: options.maxGradNorm,
    onNonFinite: 'skip',
    checkpointEverySteps: options.checkpointEverySteps,
    evaluateEverySteps: options.evaluateEverySteps,
    evaluateOnStart: options.evaluateEverySteps > 0,
    evaluationSplits: options.evaluateEverySteps > 0 ? ['seen', 'never_seen'] : [],
    prepare: { jobId: 'job', sliceBlocks: 1, chunkBlocks: 1, trainSpecJson: '{}' },
    outputDir: 'out',
    baseModelName: 'toy',
    precision: 'fp32',
    isDeterministic: !options.isFree || options.mutation === 'compareInFreeMode',
    wantedWorkers: options.numWorkers,
    limits: {
      ...defaultRunLimits,
      deadAfterMs: 1_000,
      gatherMs: 500,
      noWorkersMs: 1_000_000,
      stallAfterMs: 500,
      giveUpAfterMs: 4_000,
      joinStageMs: 6_000,
      firstBackoffMs: 100,
      longestBackoffMs: 2_000,
      checkpointRetryMs: 200,
      appendRetryMs: 100,
    },
  }
}

export function referenceRun(options: SimulationOptions): ReferenceRun {
  const config = configFor(options, 'reference')
  const order = new DataOrder(config.dataOrder)
  const [deviceClass] = options.deviceClasses
  let weights = toy.startWeights(options.numSlices)
  const digests = [toy.weightsDigest(weights)]
  const published: string[][] = [[]]
  let numSkipped = 0
  for (let step = 1; step <= order.numSteps; step++) {
    if (options.nonFinite?.step === step) {
      numSkipped++
      digests.push(toy.weightsDigest(weights))
      published.push([])
      continue
    }
    const sums = Array.from({ length: options.numSlices }, () => 0n)
    for (let index = 0; index < order.numMicroBatches(step); index++) {
      const packs = order.microBatchPacks(step, index)
      toy.gradient(weights, packs, deviceClass as string).forEach((value, slice) => {
        sums[slice] = toy.addWrapped(sums[slice] as bigint, value)
      })
    }
    const values = sums.map(toy.published)
    published.push(values.map(toy.publishedDigest))
    const update = updateNumbers({
      sumSquares: values.map(toy.sumSquares),
      maxGradNorm: config.maxGradNorm,
      learningRate: config.learningRates[step - 1] as number,
      updateNumber: step - numSkipped,
      beta1: config.beta1,
      beta2: config.beta2,
    })
    weights = toy.applyUpdate(weights, values, update)
    digests.push(toy.weightsDigest(weights))
  }
  return { numSteps: order.numSteps, digests, published }
}
