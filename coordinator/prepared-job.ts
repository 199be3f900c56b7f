/** What ingest hands to the coordinator: everything a job needs before a worker is asked. */
import type { PreflightReport__Output } from '../proto/gen/tunemesh/v1/PreflightReport.js'
import type { JobSpec } from '../proto/job-spec.js'
import type { ModelConfig } from '../proto/model-config.js'
import type { ModelFile } from '../proto/model-file.js'
import type { Precision } from '../proto/train-spec.js'

/** Where a blob ended up. */
interface BlobRef {
  /** "sha256:<hex>" */
  digest: string
  sizeBytes: number
}

/** Writes a blob given in pieces, one after another, into the content-addressed store. */
export type PutBlob = (pieces: Iterable<Uint8Array>) => Promise<BlobRef>

/** A tokenised dataset in the blob store (proto/pack-shard.ts), and what planning needs of it. */
export interface PreparedDataset {
  shard: BlobRef
  numRows: number
  numPacks: number
  numTokens: number
  numTargetTokens: number
  /** Trained tokens of each pack: the weights of I3. */
  targetsPerPack: Int32Array
  /** Length of each pack in tokens; all equal with packing. */
  tokensPerPack: Int32Array
  longestPack: number
  longestDocument: number
}

export interface NamedDataset {
  name: string
  dataset: PreparedDataset
}

export interface TokenizerInfo {
  /** Generation ends at any of these. */
  stopIds: number[]
  bosId: number | null
  eosId: number | null
  padId: number | null
  chatTemplate: string | null
  vocabSize: number
}

/** Length and learning rates of a run; a pure function of the spec and the number of packs. */
export interface RunSchedule {
  numSteps: number
  microBatchesPerStep: number
  packsPerMicroBatch: number
  /** Float64 learning rate of each step. */
  learningRates: number[]
  /**
   * Pack index of each position of the run, packsPerMicroBatch × microBatchesPerStep a step.
   * null: the order of the seed (proto/data-order.ts).
   */
  explicitOrder: number[] | null
}

export interface PreparedJob {
  spec: JobSpec
  /** Absolute: a Hugging Face folder or a .gguf file. */
  modelPath: string
  modelConfig: ModelConfig
  /** "sha256:<hex>" over the names and SHA-256 of the files that make up the model. */
  modelDigest: string
  /** Resolved against the model; empty for `full`. */
  targetModules: string[]
  tokenizer: TokenizerInfo
  train: PreparedDataset
  /** The first of `validations`. */
  validation: PreparedDataset | null
  /** Validation sets, judged apart, by name: "validation" where there is only one. */
  validations: NamedDataset[]
  schedule: RunSchedule
  /** `auto`: not settled yet (coordinator/job-precision.ts). */
  precision: Precision | 'auto'
  /** For workers that do not have them at `modelPath`. */
  modelFiles: ModelFile[]
  /** Folder of an adapter to start from; only golden jobs have one. */
  startAdapter: string | null
  startAdapterFiles: ModelFile[]
  report: PreflightReport__Output
}

/** As it is planned and run. */
export interface SettledJob extends PreparedJob {
  precision: Precision
}

/** Argument of `prepareJob` (coordinator/ingest.ts). */
export interface PrepareRequest {
  spec: JobSpec
  /** Absolute; relative paths of the job file start here. */
  baseDir: string
  /** How messages call the job file: "job.yaml". */
  jobFileName: string
  /** Where keys stand, for messages: "job.yaml:7" (proto/job-file.ts, `keyPlaces`). */
  keyPlaces?: ReadonlyMap<string, string>
  putBlob: PutBlob
  /** Tokenising threads; default: one less than the processors, at most 4, at least 1. */
  numThreads?: number
  onProgress?: (numRowsDone: number) => void
  signal?: AbortSignal
}

/** Argument of `prepareGoldenJob` (coordinator/golden-job.ts): SubmitRequest.golden_json parsed. */
export interface GoldenRequest {
  /** Absolute folder in the golden format: batches.safetensors, expected.json, model/. */
  folder: string
  finetuning: 'lora' | 'full'
  /** Model in place of `folder`/model (the smollm2 folder has none). */
  model?: string
  maxSteps?: number
  outputDir?: string
  gradientCodec?: JobSpec['gradient_codec']
  precision?: Precision
  /** bf16, full: weights and moments stay float32. */
  fp32Master?: boolean
}
