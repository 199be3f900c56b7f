/**
 * What fixes a job's arithmetic and memory on a device: made by the coordinator from the job file,
 * carried out by every worker's engine. Travels as `train_spec_json` of Prepare and PlanCall.
 */
import type { ModelConfig } from './model-config.js'

type FinetuningMethod = 'lora' | 'full'
type GradientCodec = 'q24' | 'q12' | 'q8'
/**
 * Of activations and matrix products; sums and gradients are float32 in all. bf16 needs a GPU: a
 * worker's Hello says what its device can. fp8 is bf16 with the linears of LoRA's frozen base in
 * e4m3, on Hopper.
 */
export type Precision = 'fp32' | 'bf16' | 'fp8'

/**
 * Of trained matrices and their moments. bf16: rounded stochastically at each update, keyed by the
 * job's seed and the step; full fine-tuning only. bf16_8bit: weights so, moments in 8 bits. Norm
 * gains and biases stay float32.
 */
export type StateType = 'fp32' | 'bf16' | 'bf16_8bit'

interface LoraSpec {
  loraRank: number
  alpha: number
  /** Module names such as "q_proj", resolved against the model. */
  targetModules: string[]
  useRslora: boolean
}

export interface TrainSpec {
  finetuning: FinetuningMethod
  lora: LoraSpec | null
  precision: Precision
  states: StateType
  /** Else in free mode: sums in whatever order is fastest, other bits each time. */
  deterministic: boolean
  seed: number
  /** Most tokens of one micro-batch (all its packs together). */
  tokensPerMicroBatch: number
  /** Longest document: bounds positions and attention scratch. */
  longestDocument: number
  /**
   * Rows of logits computed at a time; 0: by the device's kind and the model's shape, equal for all
   * workers of one device class.
   */
  lossChunkRows: number
  /** What layers keep until backward: memory against time, never the bits. */
  gradientCheckpointing: boolean | 'auto'
  activationOffloading: boolean | 'auto'
  codec: GradientCodec
  beta1: number
  beta2: number
  epsilon: number
  weightDecay: number
  /** int64 accumulators of contributions that a worker may hold at once (kept until applied). */
  numContributionSlots: number
  /**
   * Blocks of 256 elements in a slice, and in one frame; 0: by proto/slices.ts once the vector's
   * size is known.
   */
  sliceBlocks: number
  chunkBlocks: number
}

/** The whole of `train_spec_json`. */
export interface TrainRequest {
  config: ModelConfig
  spec: TrainSpec
}
