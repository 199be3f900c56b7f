/**
 * From a prepared job to what its workers are told: train spec, slices, the machine's
 * configuration.
 */

import { TunemeshError } from '../proto/errors.js'
import type { PlanResponse } from '../proto/gen/tunemesh/v1/PlanResponse.js'
import type { PlanResult__Output } from '../proto/gen/tunemesh/v1/PlanResult.js'
import type { Prepare } from '../proto/gen/tunemesh/v1/Prepare.js'
import { maxChunkBlocks, planSlices, type SliceLayout } from '../proto/slices.js'
import type { TrainRequest, TrainSpec } from '../proto/train-spec.js'
import type { FleetWorker } from './fleet.js'
import { estimateTime } from './job-estimate.js'
import { isDeterministic, statesOf } from './job-precision.js'
import type { PreparedJob, SettledJob } from './prepared-job.js'
import type { Tuning } from './tuning.js'

/**
 * Contributions a worker may hold: the step under way, the one before it until every worker has
 * applied it, and one re-leased set of each.
 */
const numContributionSlots = 4

/** A first spec, good enough to ask how many blocks there are; slices follow from the answer. */
function trainSpecOf(prepared: SettledJob, layout: SliceLayout | null): TrainSpec {
  const { spec, train, validations, schedule } = prepared
  const datasets = [train, ...validations.map(({ dataset }) => dataset)]
  const longestPack = Math.max(...datasets.map((set) => set.longestPack))
  return {
    finetuning: spec.finetuning,
    lora:
      spec.finetuning === 'lora'
        ? {
            loraRank: spec.r,
            alpha: spec.lora_alpha,
            targetModules: prepared.targetModules,
            useRslora: spec.use_rslora,
          }
        : null,
    precision: prepared.precision,
    states: statesOf(prepared),
    deterministic: isDeterministic(spec),
    seed: spec.seed,
    tokensPerMicroBatch: longestPack * schedule.packsPerMicroBatch,
    longestDocument: Math.max(...datasets.map((set) => set.longestDocument)),
    lossChunkRows: 0,
    gradientCheckpointing: spec.gradient_checkpointing,
    activationOffloading: spec.activation_offloading,
    codec: spec.gradient_codec,
    beta1: spec.adam_beta1,
    beta2: spec.adam_beta2,
    epsilon: spec.adam_epsilon,
    weightDecay: spec.weight_decay,
    numContributionSlots,
    sliceBlocks: layout?.sliceBlocks ?? maxChunkBlocks,
    chunkBlocks: layout?.chunkBlocks ?? maxChunkBlocks,
  }
}

/** `train_spec_json` of Prepare and PlanCall: proto/train-spec.ts TrainRequest. */
export const trainRequestJson = (prepared: SettledJob, layout: SliceLayout | null): string => {
  const request: TrainRequest = {
    config: prepared.modelConfig,
    spec: trainSpecOf(prepared, layout),
  }
  return JSON.stringify(request)
}

/** Never a function of the fleet: a resumed job has the same slices. */
export function layoutFor(numBlocks: number, tuning: Tuning): SliceLayout {
  const planned = planSlices(numBlocks)
  const sliceBlocks = tuning.sliceBlocks ?? planned.sliceBlocks
  const chunkBlocks = Math.min(sliceBlocks, tuning.chunkBlocks ?? planned.chunkBlocks)
  return { numBlocks, sliceBlocks, chunkBlocks }
}

export interface PlannedJob {
  jobId: string
  prepared: SettledJob
  layout: SliceLayout
}

export const prepareMessage = ({ jobId, prepared, layout }: PlannedJob): Prepare => ({
  jobId,
  trainSpecJson: trainRequestJson(prepared, layout),
  modelPath: prepared.modelPath,
  modelDigest: prepared.modelDigest,
  datasetDigest: prepared.train.shard.digest,
  splits: prepared.validations.map(({ name, dataset }) => ({ name, digest: dataset.shard.digest })),
  modelFiles: prepared.modelFiles,
  adapterPath: prepared.startAdapter ?? '',
  adapterFiles: prepared.startAdapterFiles,
  seed: prepared.spec.seed,
  sliceBlocks: layout.sliceBlocks,
  chunkBlocks: layout.chunkBlocks,
  microBatchSequences: prepared.schedule.packsPerMicroBatch,
})

export function planResponseOf(
  prepared: PreparedJob,
  answer: PlanResult__Output | null,
  { numWorkers, worker }: { numWorkers: number; worker: FleetWorker | null },
): PlanResponse {
  const { numSteps, microBatchesPerStep } = prepared.schedule
  const warnings: string[] = []
  if (numSteps < 50) {
    warnings.push(`The job has only ${numSteps} optimizer steps; below 50 a model learns little.`)
  }
  if (answer === null) warnings.push('No worker is attached, so the memory is not known.')
  if (worker !== null) warnings.push(...cpuWarnings(worker))
  const { seconds, basis } = estimateTime(prepared, answer, numWorkers)
  return {
    preflight: prepared.report,
    memory: answer?.memory ?? null,
    numSteps,
    microBatchesPerStep,
    warnings,
    numTrainedParameters: answer?.numTrainedParameters ?? 0,
    estimatedSeconds: seconds ?? 0,
    timeBasis: basis,
    precision: prepared.precision === 'auto' ? '' : prepared.precision,
    freeMode: !isDeterministic(prepared.spec),
  }
}

/** Of a worker whose machine has a GPU that it can't use. */
export const cpuWarnings = ({
  id,
  hello,
}: {
  id: string
  hello: { device: string; libraries: string[] }
}): string[] =>
  hello.device.startsWith('cpu')
    ? hello.libraries.map(
        (line) =>
          `Worker ${id} computes on the CPU although its machine has a GPU: ` +
          `${line.replace(/^gpu: /, '').replace(/\.$/, '')}.`,
      )
    : []

/** @throws TunemeshError DEVICE_MEMORY_SHORT with the settings that fit */
export function assertFits(
  answer: PlanResult__Output,
  worker: { id: string; memoryBytes: number },
  fitting: string | null,
): void {
  const needed = answer.memory?.totalBytes ?? 0
  if (worker.memoryBytes === 0 || needed <= worker.memoryBytes) return
  const size = (bytes: number) =>
    bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(1)} MiB` : `${(bytes / 2 ** 30).toFixed(1)} GiB`
  throw new TunemeshError(
    'DEVICE_MEMORY_SHORT',
    `Worker ${worker.id} needs ${size(needed)} and has ${size(worker.memoryBytes)}. ` +
      (fitting ?? 'Lower max_length or r, or take a smaller model.'),
  )
}
