/**
 * The native engine as the worker sees it. Only this file loads the addon.
 *
 * One Engine is one device with one native thread that issues its work; every promise here resolves
 * without the event loop having waited. Big numbers never become JavaScript arrays: gradients and
 * frames live in native slabs that are exposed once as external ArrayBuffers.
 */
import type { ModelConfig } from '../proto/model-config.js'
import type { TrainSpec } from '../proto/train-spec.js'

export type { FinetuningMethod, GradientCodec, LoraSpec, TrainSpec } from '../proto/train-spec.js'

export interface EngineOptions {
  /** Hugging Face folder or .gguf file. */
  modelPath: string
  config: ModelConfig
  /** 0: all that the process may use. */
  numThreads: number
  instructionPath: 'auto' | 'generic' | 'avx2' | 'avx512'
  /** Folder for packed weights shared by the workers of a machine; null: keep them private. */
  packedCacheDir: string | null
}

/** A trained tensor in canonical order: natural sort of Hugging Face or PEFT names, row-major. */
export interface TrainedTensor {
  name: string
  shape: number[]
  numElements: number
  /** First block; a block never straddles tensors, the last one of a tensor is filled with zeros. */
  firstBlock: number
}

export interface MemoryUse { purpose: string; sizeBytes: number }
export interface MemoryPlan {
  totalBytes: number
  uses: MemoryUse[]
  numTrainedParameters: number
  numBlocks: number
}

/** A stream of tokens with its documents: attention and positions start anew at each document. */
export interface TokenBatch {
  tokens: Int32Array
  /** targets[i] is the token that position i must predict, -100 where nothing is trained. */
  targets: Int32Array
  /** Ascending starts, last = tokens.length. */
  documentStarts: Int32Array
}

export interface MicroBatchResult { lossSum: number; numTargetTokens: number; computeMs: number }
export interface UpdateNumbers {
  learningRate: number
  clipFactor: number
  biasCorrection1: number
  biasCorrection2Sqrt: number
}

export interface GenerateOptions {
  promptIds: Int32Array
  maxNewTokens: number
  temperature: number
  topP: number
  seed: bigint
  stopIds: number[]
}

export interface Engine {
  /** "cpu: 2 threads, avx512" */
  readonly device: string
  /** Hash of engine build, instruction path and numeric plan. */
  readonly deviceClass: string
  /** Static: computes every buffer, takes no device memory. */
  plan(spec: TrainSpec): MemoryPlan
  /** Loads the weights (mapped where packed ones are cached). Call once, before anything below. */
  load(): Promise<void>
  /** Reserves the arena exactly as planned and seals it; initialises adapter or trained weights and optimizer. */
  prepare(spec: TrainSpec): Promise<{ memory: MemoryPlan; tensors: TrainedTensor[] }>
  /** Start adapter in PEFT layout. */
  loadAdapter(folder: string): Promise<void>
  /**
   * Gradient of one micro-batch, its loss divided by `lossDivisor`, rounded by the codec and added to a
   * contribution slot. Throws NON_FINITE_GRADIENT (with `tensor`) and leaves the slot unusable until cleared.
   */
  microBatch(batch: TokenBatch, lossDivisor: number, slot: number): Promise<MicroBatchResult>
  /** Loss only. */
  evaluate(batch: TokenBatch): Promise<MicroBatchResult>
  /** AdamW with the published gradient in sum slot `step % 2` of the exchange buffers. */
  applyUpdate(step: number, update: UpdateNumbers): Promise<void>
  /** SHA-256 (hex) of the trained tensors' float32 bytes in canonical order, without fill. */
  weightsDigest(): Promise<string>
  /** Trained weights and both moments into a file (safetensors, names weight.<n>, m.<n>, v.<n>, metadata step). */
  writeState(path: string, step: number): Promise<void>
  readState(path: string): Promise<{ step: number }>
  /** PEFT adapter folder, or for `full` the model folder's model.safetensors. */
  writeAdapter(folder: string, baseModelName: string): Promise<void>
  /** Mean absolute change of each trained tensor's effective weight since the start, by tensor or LoRA module. */
  weightChange(): Promise<{ name: string; meanAbsChange: number }[]>
  /** Logits of every position, row-major [N, V]; for tests and the golden runs. */
  logits(batch: TokenBatch): Promise<Float32Array>
  /** Unrounded float32 gradient of the mean loss of one batch; for tests and the golden runs. */
  gradients(batch: TokenBatch, lossDivisor: number): Promise<{ name: string; values: Float32Array }[]>
  /** One call a token; null: aborted. */
  generate(options: GenerateOptions, onToken: (id: number) => void, signal?: AbortSignal): Promise<{ ids: number[]; finishReason: 'stop' | 'length' | 'aborted' }>
  /** The exchange side of the same memory (worker/exchange-buffers.ts). */
  readonly exchangeHandle: object
  close(): Promise<void>
}
