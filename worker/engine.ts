/**
 * The native engine as the worker sees it.
 *
 * One Engine is one device with one native thread that issues its work; every promise here resolves
 * without the event loop having waited. Big numbers never become JavaScript arrays: gradients and
 * frames live in native slabs that are exposed once as external ArrayBuffers.
 */
import { TunemeshError } from '../proto/errors.js'
import type { ModelConfig } from '../proto/model-config.js'
import type { Precision, TrainSpec } from '../proto/train-spec.js'
import { asTunemeshError, callAddon, calling, settling } from './addon.js'
import { type DeviceOptions, nativeDevice } from './device.js'

export interface EngineOptions extends DeviceOptions {
  /** Hugging Face folder or .gguf file. */
  modelPath: string
  config: ModelConfig
  /** By default fp32, the CPU's only one. */
  precision?: Precision
  /** By default true. */
  deterministic?: boolean
}

/** A trained tensor in canonical order: natural sort of Hugging Face or PEFT names, row-major. */
export interface TrainedTensor {
  name: string
  shape: number[]
  numElements: number
  /**
   * First block; a block never straddles tensors, the last one of a tensor is filled with zeros.
   */
  firstBlock: number
}

interface MemoryUse {
  purpose: string
  sizeBytes: number
}

/** How many layers keep what until their backward: KeptLayers of proto/job.proto. */
interface KeptLayers {
  everything: number
  products: number
  attentionHalves: number
  inputs: number
  offloaded: number
  embeddingOnHost: boolean
}

export interface MemoryPlan {
  totalBytes: number
  uses: MemoryUse[]
  layers: KeptLayers
  numTrainedParameters: number
  numBlocks: number
  /** The model's packed file, mapped and shared by a machine's workers: not in `totalBytes`. */
  mappedBytes: number
}

interface ProductRate {
  /** 2 a multiply-add. */
  flopsPerSecond: number
  /** How long the measurement took. */
  measuredSeconds: number
}

/** A stream of tokens with its documents: attention and positions start anew at each document. */
export interface TokenBatch {
  tokens: Int32Array
  /** targets[i] is the token that position i must predict, -100 where nothing is trained. */
  targets: Int32Array
  /** Ascending starts, last = tokens.length. A batch without tokens has [0]. */
  documentStarts: Int32Array
}

export interface MicroBatchResult {
  lossSum: number
  numTargetTokens: number
  computeMs: number
  /** What runs slower on this device than it could, and why; each is told once. For the log. */
  notes: string[]
}

/** A slice of a contribution that stands: nothing will be added to it. */
export interface ContributionSlice {
  slice: number
  /** Linear digest, 16 hex digits. */
  digest: string
  /** Of all frames of the slice, headers included. */
  packedBytes: number
}
export type SliceListener = (told: ContributionSlice) => void

/** Where a micro-batch's gradient goes. */
export interface MicroBatchTarget {
  slot: number
  /**
   * In the last micro-batch of a contribution: hears of each slice once, as soon as backward has
   * finished all of it, every slice before the promise resolves. After a gradient that fails it
   * hears no more. The engine's thread does not wait for it.
   */
  onSlice?: SliceListener
  /** Each operation is waited for, so that DEVICE_FAILED names the one that failed. Slow. */
  isChecked?: boolean
  /** More is added to the slot before anything reads it: a device need not hand it over yet. */
  moreFollows?: boolean
}

export interface UpdateNumbers {
  learningRate: number
  clipFactor: number
  biasCorrection1: number
  biasCorrection2Sqrt: number
}

interface GenerateOptions {
  promptIds: Int32Array
  maxNewTokens: number
  /** 0: greedy. */
  temperature: number
  topP: number
  seed: bigint
  /** Ids that end the answer; they are neither reported nor returned. */
  stopIds: number[]
}

interface GenerateResult {
  ids: number[]
  finishReason: 'stop' | 'length' | 'aborted'
}

interface NamedValues {
  name: string
  values: Float32Array
}

export interface Engine {
  /** "cpu: 2 threads, avx512" */
  readonly device: string
  /** Hash of engine build, instruction path and numeric plan. */
  readonly deviceClass: string
  /** Computes every buffer, takes no device memory, needs no load(). */
  plan(spec: TrainSpec): MemoryPlan
  /** Speed of matrix products of the model's shapes on this device; needs no load(). */
  productRate(numTokens: number): Promise<ProductRate>
  /**
   * Opens the model's files and checks every tensor against the configuration. Once, before
   * anything below.
   */
  load(): Promise<void>
  /**
   * Reserves the arena exactly as planned and seals it; initialises adapter or trained weights and
   * optimizer. Once in an engine's life. LoRA packs or maps the frozen model here, unless
   * generation did before.
   */
  prepare(spec: TrainSpec): Promise<{ memory: MemoryPlan; tensors: TrainedTensor[] }>
  /**
   * Adapter in PEFT layout: the job's start where a job is prepared, else for generation and
   * evaluation only.
   */
  loadAdapter(folder: string): Promise<void>
  /**
   * Gradient of one micro-batch, its loss divided by `lossDivisor`, rounded by the codec and added
   * to a contribution slot. Throws NON_FINITE_GRADIENT or GRADIENT_OUT_OF_RANGE (the tensor's name
   * in `details[0]`) and leaves the slot unusable until cleared. After DEVICE_FAILED (the operation
   * in `details[0]`) nothing more can be done with the device in this process.
   */
  microBatch(
    batch: TokenBatch,
    lossDivisor: number,
    into: MicroBatchTarget,
  ): Promise<MicroBatchResult>
  /** Loss only. */
  evaluate(batch: TokenBatch): Promise<MicroBatchResult>
  /**
   * A slice of the step's published sum is whole, or was written again: it travels to a device with
   * memory of its own, before the update asks for it.
   */
  fetchSum(step: number, slice: number): Promise<void>
  /** AdamW with the published gradient in sum slot `step % 2` of the exchange buffers. */
  applyUpdate(step: number, update: UpdateNumbers): Promise<void>
  /** SHA-256 (hex) of the trained tensors' float32 bytes in canonical order, without fill. */
  weightsDigest(): Promise<string>
  /**
   * Trained weights and both moments into a file (safetensors, weight.<name>, m.<name>, v.<name>,
   * of 8-bit moments m_exponents.<name> and v_exponents.<name>; metadata step).
   */
  writeState(path: string, step: number): Promise<void>
  readState(path: string): Promise<{ step: number }>
  /**
   * PEFT adapter folder, or for `full` the model folder's model.safetensors. The folder must exist.
   */
  writeAdapter(folder: string, baseModelName: string): Promise<void>
  /**
   * Mean absolute change of each trained tensor's effective weight since the start, by tensor or
   * LoRA module.
   */
  weightChange(): Promise<{ name: string; meanAbsChange: number }[]>
  /** Logits of every position, row-major [N, V]; for tests and the golden runs. */
  logits(batch: TokenBatch): Promise<Float32Array>
  /** Unrounded float32 gradient of the mean loss of one batch; for tests and the golden runs. */
  gradients(batch: TokenBatch, lossDivisor: number): Promise<NamedValues[]>
  /** Copies of the trained tensors; for tests and the golden runs. */
  weights(): Promise<NamedValues[]>
  /** One call a token. */
  generate(
    options: GenerateOptions,
    onToken: (id: number) => void,
    signal?: AbortSignal,
  ): Promise<GenerateResult>
  /** The exchange side of the same memory (worker/exchange-buffers.ts); throws before prepare(). */
  readonly exchangeHandle: object
  /** Ends a running generation, waits for a running step, then frees the memory. */
  close(): Promise<void>
}

/** The engine of one model on this machine's device; load() it next. */
export function openEngine(options: EngineOptions): Engine {
  const { precision = 'fp32', deterministic = true } = options
  return new NativeEngine(
    callAddon<NativeEngineObject>('createEngine', {
      ...options,
      ...nativeDevice(options, { precision, deterministic }),
    }),
  )
}

type NativeCall = (...values: unknown[]) => Promise<unknown>

interface NativeEngineObject {
  device: string
  deviceClass: string
  plan(spec: TrainSpec): MemoryPlan
  prepare(
    spec: TrainSpec,
  ): Promise<{ memory: MemoryPlan; tensors: TrainedTensor[]; exchange: object }>
  generate(
    options: GenerateOptions,
    onToken: (id: number) => void,
  ): { promise: Promise<Partial<GenerateResult> & { error?: unknown }>; abort(): void }
  productRate: NativeCall
  load: NativeCall
  loadAdapter: NativeCall
  microBatch: NativeCall
  evaluate: NativeCall
  fetchSum: NativeCall
  applyUpdate: NativeCall
  weightsDigest: NativeCall
  writeState: NativeCall
  readState: NativeCall
  writeAdapter: NativeCall
  weightChange: NativeCall
  logits: NativeCall
  gradients: NativeCall
  weights: NativeCall
  close: NativeCall
}

class NativeEngine implements Engine {
  readonly device: string
  readonly deviceClass: string
  #exchange: object | null = null

  constructor(private readonly native: NativeEngineObject) {
    this.device = native.device
    this.deviceClass = native.deviceClass
  }

  get exchangeHandle(): object {
    if (!this.#exchange) {
      throw new TunemeshError('STATE_CONFLICT', 'the engine has no job yet: prepare() it first')
    }
    return this.#exchange
  }

  plan(spec: TrainSpec): MemoryPlan {
    return calling(() => this.native.plan(spec))
  }

  async prepare(spec: TrainSpec): Promise<{ memory: MemoryPlan; tensors: TrainedTensor[] }> {
    const { exchange, ...prepared } = await settling(() => this.native.prepare(spec))
    this.#exchange = exchange
    return prepared
  }

  async generate(
    options: GenerateOptions,
    onToken: (id: number) => void,
    signal?: AbortSignal,
  ): Promise<GenerateResult> {
    if (signal?.aborted) return { ids: [], finishReason: 'aborted' }
    const running = calling(() => this.native.generate(options, onToken))
    const abort = () => running.abort()
    signal?.addEventListener('abort', abort, { once: true })
    try {
      const { error, ...result } = await running.promise
      if (error) throw asTunemeshError(error)
      return result as GenerateResult
    } finally {
      signal?.removeEventListener('abort', abort)
    }
  }

  productRate = (numTokens: number) => this.#call<ProductRate>('productRate', numTokens)
  load = () => this.#call<void>('load')
  loadAdapter = (folder: string) => this.#call<void>('loadAdapter', folder)
  microBatch = (
    batch: TokenBatch,
    lossDivisor: number,
    { slot, onSlice, isChecked = false, moreFollows = false }: MicroBatchTarget,
  ) =>
    this.#call<MicroBatchResult>(
      'microBatch',
      batch,
      lossDivisor,
      slot,
      onSlice,
      isChecked,
      moreFollows,
    )
  evaluate = (batch: TokenBatch) => this.#call<MicroBatchResult>('evaluate', batch)
  fetchSum = (step: number, slice: number) => this.#call<void>('fetchSum', step, slice)
  applyUpdate = (step: number, update: UpdateNumbers) =>
    this.#call<void>('applyUpdate', step, update)
  weightsDigest = () => this.#call<string>('weightsDigest')
  writeState = (path: string, step: number) => this.#call<void>('writeState', path, step)
  readState = (path: string) => this.#call<{ step: number }>('readState', path)
  writeAdapter = (folder: string, baseModelName: string) =>
    this.#call<void>('writeAdapter', folder, baseModelName)
  weightChange = () => this.#call<{ name: string; meanAbsChange: number }[]>('weightChange')
  logits = (batch: TokenBatch) => this.#call<Float32Array>('logits', batch)
  gradients = (batch: TokenBatch, lossDivisor: number) =>
    this.#call<NamedValues[]>('gradients', batch, lossDivisor)
  weights = () => this.#call<NamedValues[]>('weights')

  #closed: Promise<void> | null = null
  close = (): Promise<void> => {
    this.#exchange = null
    this.#closed ??= this.#call<void>('close')
    return this.#closed
  }

  #call<T>(name: keyof NativeEngineObject, ...values: unknown[]): Promise<T> {
    return settling(() => (this.native[name] as NativeCall)(...values) as Promise<T>)
  }
}
