/** How long a job's steps will take: its work by the usual count, over a measured speed. Pure. */
import type { PlanResult__Output } from '../proto/gen/tunemesh/v1/PlanResult.js'
import type { ModelConfig } from '../proto/model-config.js'
import type { PreparedJob } from './prepared-job.js'

/**
 * Whole steps reach about this share of the rate of their matrix products
 * (bench/results: cpu-step beside cpu-gemm).
 */
const stepShare = 0.7
/** What leases, the commit log and the update add to a step (bench/results: mesh-overhead). */
const meshSecondsPerStep = 0.03

export interface TimeEstimate {
  /** null: nobody has measured. */
  seconds: number | null
  /** What it rests on, or why there is none. */
  basis: string
}

export function estimateTime(
  prepared: PreparedJob,
  answer: PlanResult__Output | null,
  numWorkers: number,
): TimeEstimate {
  if (answer === null) return { seconds: null, basis: 'no worker is attached' }
  const { productFlopsPerSecond, measuredSeconds } = answer
  if (!(productFlopsPerSecond > 0)) {
    return { seconds: null, basis: 'the worker trains another job and was not measured' }
  }
  const flops = numTokensOf(prepared) * flopsPerToken(prepared, answer.numTrainedParameters)
  const workers = numWorkers === 1 ? '1 worker' : `${numWorkers} workers`
  const gigaflops = (productFlopsPerSecond / 1e9).toFixed(0)
  return {
    seconds:
      flops / (productFlopsPerSecond * stepShare) / numWorkers +
      prepared.schedule.numSteps * meshSecondsPerStep,
    basis:
      `${workers}; from a ${measuredSeconds.toFixed(1)} s measurement on this machine: ` +
      `products run at ${gigaflops} GFLOP/s, steps at about ${stepShare} of that`,
  }
}

/** Of all steps; an epoch's last step may have fewer. */
function numTokensOf({ spec, train, schedule }: PreparedJob): number {
  const packsOfSteps =
    schedule.numSteps * schedule.microBatchesPerStep * schedule.packsPerMicroBatch
  const numPacks = Math.min(packsOfSteps, train.numPacks * Math.max(1, spec.num_train_epochs))
  const numTokens = train.tokensPerPack.reduce((sum, tokens) => sum + tokens, 0)
  return (numPacks * numTokens) / Math.max(1, train.numPacks)
}

/**
 * 6 P for full fine-tuning, 4 P_frozen + 6 P_adapter for LoRA, P the matrices' elements; the head's
 * for trained tokens only; attention 6 T H F a layer with documents of T tokens (causal, forward
 * once and backward twice).
 */
export function flopsPerToken(prepared: PreparedJob, numTrained: number): number {
  const { modelConfig: config, report, train, spec } = prepared
  const { layers, head } = matrixElements(config)
  const trainedShare = report.numTokens > 0 ? report.numTargetTokens / report.numTokens : 1
  const elements = layers + head * trainedShare
  const products = spec.finetuning === 'full' ? 6 * elements : 4 * elements + 6 * numTrained
  const documentTokens =
    report.numUsedRows > 0 ? report.numTokens / report.numUsedRows : train.longestDocument
  const width = config.numHeads * config.headSize
  return products + 6 * documentTokens * width * config.numLayers
}

function matrixElements(config: ModelConfig): { layers: number; head: number } {
  const { hiddenSize, intermediateSize, numHeads, numKvHeads, headSize } = config
  const attention = 2 * hiddenSize * headSize * (numHeads + numKvHeads)
  const feedForward = 3 * hiddenSize * intermediateSize
  return {
    layers: config.numLayers * (attention + feedForward),
    head: hiddenSize * config.vocabSize,
  }
}
