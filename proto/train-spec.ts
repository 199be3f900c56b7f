/** What fixes the arithmetic and the memory of a job on one device: made by the coordinator, obeyed by the engine. */

export type FinetuningMethod = 'lora' | 'full'
export type GradientCodec = 'q24' | 'q12' | 'q8'

export interface LoraSpec {
  loraRank: number
  alpha: number
  /** Module names such as "q_proj"; already resolved against the model by the coordinator. */
  targetModules: string[]
  useRslora: boolean
}

/** Everything that fixes the arithmetic and the memory of a job on one device. */
export interface TrainSpec {
  finetuning: FinetuningMethod
  lora: LoraSpec | null
  seed: number
  /** Most tokens of one micro-batch (all its sequences together). */
  tokensPerMicroBatch: number
  /** Longest document, which bounds positions and attention scratch. */
  longestDocument: number
  /** Rows of logits computed at a time. */
  lossChunkRows: number
  codec: GradientCodec
  beta1: number
  beta2: number
  epsilon: number
  weightDecay: number
  /** int64 accumulators of contributions that this worker may hold at once (kept until applied). */
  numContributionSlots: number
  /** Blocks of 256 elements in a slice, and in one frame. */
  sliceBlocks: number
  chunkBlocks: number
}
