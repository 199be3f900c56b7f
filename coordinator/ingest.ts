/**
 * Ingest: from a validated job file to packed shards in the blob store. Takes no device.
 *
 *   model's config and files → rows → tokens and loss mask (tokenizer-thread.ts) → validation split
 *   → packs (packing.ts) → shards (proto/pack-shard.ts) → preflight report (preflight.ts)
 */
import { isAbsolute, resolve } from 'node:path'
import { DataOrder } from '../proto/data-order.js'
import { TunemeshError } from '../proto/errors.js'
import type { RenderedSample__Output } from '../proto/gen/tunemesh/v1/RenderedSample.js'
import { type JobKey, type JobSpec, linearModules } from '../proto/job-spec.js'
import type { ModelConfig } from '../proto/model-config.js'
import { numPacks, type PackShard, packShardBytes } from '../proto/pack-shard.js'
import { type BaseModel, readBaseModel } from './ingest-model.js'
import { heldOut, type IngestedFile, type IngestedRow, ingestRows } from './ingest-rows.js'
import { learningRates } from './ingest-schedule.js'
import { askedPrecision } from './job-precision.js'
import { describeModel } from './model-files.js'
import { countTargets, lengthBucketTokens, packRows } from './packing.js'
import { preflightReport, spansOf } from './preflight.js'
import type {
  NamedDataset,
  PreparedDataset,
  PreparedJob,
  PrepareRequest,
  PutBlob,
  RunSchedule,
  TokenizerInfo,
} from './prepared-job.js'
import { TokenizerPool } from './tokenizer-pool.js'

/**
 * @throws TunemeshError with every problem of its kind: the first as message, others as details
 */
export async function prepareJob(request: PrepareRequest): Promise<PreparedJob> {
  const { spec, baseDir } = request
  const model = readBaseModel(absolute(baseDir, spec.model), spec.model)
  const maxLength = maxLengthOf(request, model.config)
  const pool = new TokenizerPool({ modelPath: model.path }, request.numThreads)
  try {
    const tokenizer = await pool.call('describe')
    checkVocabulary(tokenizer, model, spec)
    const data = await readDatasets({ request, pool, maxLength })
    const packing = { packing: spec.packing, maxLength, bucketTokens: lengthBucketTokens }
    const store = (rows: readonly IngestedRow[]) =>
      storeDataset(packRows(rows, packing), rows, request.putBlob)
    const train = await store(data.trainRows)
    const validations: NamedDataset[] = []
    for (const { name, rows } of data.validations) {
      validations.push({ name, dataset: await store(rows) })
    }
    for (const id of data.trainFile.stopIds) {
      if (!tokenizer.stopIds.includes(id)) tokenizer.stopIds.push(id)
    }
    const samples = await renderSamples(data.trainFile, data.trainRows, pool)
    return {
      spec,
      modelPath: model.path,
      modelConfig: model.config,
      ...(await describeModel(model)),
      targetModules: targetModulesOf(spec),
      tokenizer,
      train,
      validation: validations[0]?.dataset ?? null,
      validations,
      schedule: scheduleOf(spec, train.numPacks),
      precision: askedPrecision(spec),
      startAdapter: null,
      startAdapterFiles: [],
      report: preflightReport({
        ...data,
        validationRows: data.validations.flatMap(({ rows }) => rows),
        train,
        tokenizer,
        maxLength,
        samples,
      }),
    }
  } finally {
    await pool.close()
  }
}

const absolute = (baseDir: string, path: string): string =>
  isAbsolute(path) ? path : resolve(baseDir, path)

/** Longest pack where the job file names none; TRL's default. */
const defaultMaxLength = 1024

function maxLengthOf(request: PrepareRequest, config: ModelConfig): number {
  const limit = config.maxPositionEmbeddings
  const { max_length } = request.spec
  if (max_length === null) return Math.min(defaultMaxLength, limit)
  if (max_length <= limit) return max_length
  throw keyProblem(
    request,
    'max_length',
    `${max_length} is beyond the model's max_position_embeddings ${limit}. Use at most ${limit}.`,
  )
}

function keyProblem(request: PrepareRequest, key: JobKey, problem: string): TunemeshError {
  const place = request.keyPlaces?.get(key) ?? request.jobFileName
  return new TunemeshError('JOB_INVALID', `${place} ${key}: ${problem}`)
}

function checkVocabulary(tokenizer: TokenizerInfo, model: BaseModel, spec: JobSpec): void {
  if (tokenizer.vocabSize <= model.config.vocabSize) return
  throw new TunemeshError(
    'TOKENIZER_INVALID',
    `The tokenizer of ${spec.model} has ids up to ${tokenizer.vocabSize - 1}, but the ` +
      `model's vocabulary ` +
      `has ${model.config.vocabSize} entries. They do not belong together.`,
  )
}

interface Datasets {
  trainFile: IngestedFile
  trainRows: IngestedRow[]
  validations: { name: string; rows: IngestedRow[] }[]
}

interface ReadRequest {
  request: PrepareRequest
  pool: TokenizerPool
  maxLength: number
}

async function readDatasets({ request, pool, maxLength }: ReadRequest): Promise<Datasets> {
  const { spec, baseDir, onProgress, signal } = request
  const read = (shown: string, kind: JobSpec['kind']) =>
    ingestRows({
      path: absolute(baseDir, shown),
      shown,
      kind,
      maxLength,
      onLongRow: spec.on_long_row,
      pool,
      onProgress,
      signal,
    })
  const trainFile = await read(spec.data, spec.kind)
  const { rows } = trainFile
  if (spec.eval_data !== null) {
    const validations: Datasets['validations'] = []
    for (const [name, path] of evalFilesOf(spec.eval_data)) {
      validations.push({ name, rows: (await read(path, trainFile.kind)).rows })
    }
    return { trainFile, trainRows: rows, validations }
  }
  if (spec.validation_split === 0) return { trainFile, trainRows: rows, validations: [] }
  if (rows.length < 2) {
    const problem = `${spec.data} has 1 row, too few to split. Use 0.`
    throw keyProblem(request, 'validation_split', problem)
  }
  const chosen = heldOut(rows.length, spec.validation_split, spec.seed)
  const held = rows.filter((_, row) => chosen.has(row))
  return {
    trainFile,
    trainRows: rows.filter((_, row) => !chosen.has(row)),
    validations: [{ name: onlyValidation, rows: held }],
  }
}

/** Name of a validation set that the job file gives no name. */
const onlyValidation = 'validation'

const evalFilesOf = (given: string | Record<string, string>): [name: string, path: string][] =>
  typeof given === 'string' ? [[onlyValidation, given]] : Object.entries(given)

/** Writes a shard and gives what planning needs of it. */
export async function storeDataset(
  shard: PackShard,
  rows: readonly { ids: Int32Array }[],
  putBlob: PutBlob,
): Promise<PreparedDataset> {
  const targetsPerPack = countTargets(shard)
  const tokensPerPack = Int32Array.from(
    targetsPerPack,
    (_, pack) => (shard.packOffsets[pack + 1] ?? 0) - (shard.packOffsets[pack] ?? 0),
  )
  const most = (values: Iterable<number>) => {
    let largest = 0
    for (const value of values) largest = Math.max(largest, value)
    return largest
  }
  const blob = await putBlob(packShardBytes(shard))
  return {
    shard: { digest: blob.digest, sizeBytes: blob.sizeBytes },
    numRows: rows.length,
    numPacks: numPacks(shard),
    numTokens: rows.reduce((sum, row) => sum + row.ids.length, 0),
    numTargetTokens: targetsPerPack.reduce((sum, count) => sum + count, 0),
    targetsPerPack,
    tokensPerPack,
    longestPack: most(tokensPerPack),
    longestDocument: longestDocument(shard),
  }
}

function longestDocument({ documentStarts }: PackShard): number {
  let longest = 0
  for (let i = 1; i < documentStarts.length; i += 1) {
    longest = Math.max(longest, (documentStarts[i] ?? 0) - (documentStarts[i - 1] ?? 0))
  }
  return longest
}

/** In one order whatever the job file's is. */
export const targetModulesOf = (spec: JobSpec): string[] => {
  if (spec.finetuning === 'full') return []
  return linearModules.filter(
    (name) => spec.target_modules === 'all-linear' || spec.target_modules.includes(name),
  )
}

function scheduleOf(spec: JobSpec, packs: number): RunSchedule {
  const packsPerMicroBatch = spec.per_device_train_batch_size
  const microBatchesPerStep = spec.gradient_accumulation_steps
  const { numSteps } = new DataOrder({
    seed: spec.seed,
    numPacks: packs,
    packsPerMicroBatch,
    microBatchesPerStep,
    numEpochs: spec.num_train_epochs,
    maxSteps: spec.max_steps === -1 ? null : spec.max_steps,
    explicitOrder: null,
  })
  return {
    numSteps,
    microBatchesPerStep,
    packsPerMicroBatch,
    learningRates: learningRates(spec, numSteps),
    explicitOrder: null,
  }
}

/** Tokens of a sample that are shown. */
const maxSampleTokens = 1000

/** The first row and the one in the middle, with what is trained of them. */
async function renderSamples(
  file: IngestedFile,
  rows: readonly IngestedRow[],
  pool: TokenizerPool,
): Promise<RenderedSample__Output[]> {
  const chosen = [...new Set([rows[0], rows[Math.floor(rows.length / 2)]])]
  const samples: RenderedSample__Output[] = []
  for (const row of chosen) {
    if (!row) continue
    const shown = {
      ...row,
      ids: row.ids.subarray(0, maxSampleTokens),
      labels: row.labels.subarray(0, maxSampleTokens),
    }
    const spans = await Promise.all(
      spansOf(shown).map(async ({ ids, trained }) => ({
        text: await pool.call('decode', ids),
        trained,
      })),
    )
    samples.push({ file: file.shown, line: row.line, spans })
  }
  return samples
}
