/**
 * Golden jobs, for tests only: tokens and labels as given, unpacked, in the given order, learning
 * rates as a table, a start adapter. Reads a folder in the format of test/golden/README.md.
 */
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { z } from 'zod'
import { TunemeshError } from '../proto/errors.js'
import { type JobSpec, jobSpecSchema } from '../proto/job-spec.js'
import { storeDataset, targetModulesOf } from './ingest.js'
import { readBaseModel } from './ingest-model.js'
import { describeFolder, describeModel } from './model-files.js'
import { type LabelledIds, packRows } from './packing.js'
import type { GoldenRequest, PreparedJob, PutBlob } from './prepared-job.js'

const requestSchema = z.strictObject({
  folder: z.string(),
  finetuning: z.enum(['lora', 'full']),
  model: z.string().optional(),
  maxSteps: z.int().min(1).optional(),
  outputDir: z.string().optional(),
  gradientCodec: z.enum(['q24', 'q12', 'q8']).optional(),
  precision: z.enum(['fp32', 'bf16', 'fp8']).optional(),
  fp32Master: z.boolean().optional(),
})

const trainingSchema = z.object({
  lr: z.number().optional(),
  weight_decay: z.number(),
  max_grad_norm: z.number(),
  steps: z.array(
    z.object({
      lr: z.number(),
      /** Examples of a step, where steps are made of single rows. */
      rows: z.array(z.int()).optional(),
    }),
  ),
})

const expectedSchema = z.object({
  full_training: trainingSchema.optional(),
  lora_training: trainingSchema.optional(),
  examples: z.array(z.object({ ids: z.array(z.int()), labels: z.array(z.int()) })).optional(),
})

const adapterSchema = z.object({
  r: z.int(),
  lora_alpha: z.number(),
  use_rslora: z.boolean().default(false),
  target_modules: z.array(z.string()),
})

/** @throws TunemeshError JOB_INVALID where the request or the folder is not of the form */
export async function prepareGoldenJob(text: string, putBlob: PutBlob): Promise<PreparedJob> {
  const request = parse(requestSchema, JSON.parse(text), 'golden_json') as GoldenRequest
  const expectedPath = join(request.folder, 'expected.json')
  const expected = parse(expectedSchema, readJson(expectedPath), expectedPath)
  const training = request.finetuning === 'full' ? expected.full_training : expected.lora_training
  if (!training) {
    throw new TunemeshError('JOB_INVALID', `${expectedPath} has no ${request.finetuning}_training.`)
  }
  const rows = expected.examples?.map(labelledIds) ?? readBatches(request.folder)
  const data = orderOf(rows, training.steps)
  const numSteps = Math.min(request.maxSteps ?? training.steps.length, training.steps.length)
  const spec = specOf(request, { training, numSteps, data })
  const model = readBaseModel(spec.model, spec.model)
  const exact = { packing: false, maxLength: 1 << 20, bucketTokens: 1 }
  const train = await storeDataset(packRows(rows, exact), rows, putBlob)
  const startAdapter = request.finetuning === 'lora' ? join(request.folder, 'adapter') : null
  return {
    spec,
    modelPath: model.path,
    modelConfig: model.config,
    ...(await describeModel(model)),
    targetModules: targetModulesOf(spec),
    tokenizer: noTokenizer(model.config.vocabSize),
    train,
    validation: null,
    validations: [],
    schedule: {
      numSteps,
      microBatchesPerStep: data.microBatchesPerStep,
      packsPerMicroBatch: data.packsPerMicroBatch,
      learningRates: training.steps.slice(0, numSteps).map(({ lr }) => lr),
      explicitOrder: data.order.slice(
        0,
        numSteps * data.microBatchesPerStep * data.packsPerMicroBatch,
      ),
    },
    precision: request.precision ?? 'fp32',
    startAdapter,
    startAdapterFiles: startAdapter === null ? [] : await describeFolder(startAdapter),
    report: reportOf(train, rows.length),
  }
}

function parse<T>(schema: z.ZodType<T>, value: unknown, place: string): T {
  const parsed = schema.safeParse(value)
  if (parsed.success) return parsed.data
  const issue = parsed.error.issues[0]
  const message = `${place} ${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'invalid'}`
  throw new TunemeshError('JOB_INVALID', message)
}

const readJson = (path: string): unknown => {
  if (existsSync(path)) return JSON.parse(readFileSync(path, 'utf8'))
  throw new TunemeshError('JOB_INVALID', `${path} is missing. Is it a golden folder?`)
}

const labelledIds = (row: { ids: number[]; labels: number[] }): LabelledIds => ({
  ids: Int32Array.from(row.ids),
  labels: Int32Array.from(row.labels),
})

interface OrderedData {
  packsPerMicroBatch: number
  microBatchesPerStep: number
  order: number[]
}

/** Sequences of one batch file: `input_ids.k` and `labels.k`, [2, 24] each, in the order of k. */
const rowsPerBatch = 2
const batchesPerStep = 2

function orderOf(
  rows: readonly LabelledIds[],
  steps: { rows?: number[] | undefined }[],
): OrderedData {
  if (steps[0]?.rows) {
    const order = steps.flatMap((step) => step.rows ?? [])
    return { packsPerMicroBatch: 1, microBatchesPerStep: steps[0].rows.length, order }
  }
  const perStep = rowsPerBatch * batchesPerStep
  const order = steps.flatMap((_, step) =>
    Array.from({ length: perStep }, (_, place) => (step * perStep + place) % rows.length),
  )
  return { packsPerMicroBatch: rowsPerBatch, microBatchesPerStep: batchesPerStep, order }
}

function specOf(
  request: GoldenRequest,
  given: { training: z.output<typeof trainingSchema>; numSteps: number; data: OrderedData },
): JobSpec {
  const { training, numSteps, data } = given
  const lora =
    request.finetuning === 'lora'
      ? parse(
          adapterSchema,
          readJson(join(request.folder, 'adapter', 'adapter_config.json')),
          'adapter_config.json',
        )
      : null
  const spec = {
    model: request.model ?? modelIn(request.folder),
    data: join(request.folder, 'batches.safetensors'),
    name: `golden ${request.finetuning}`,
    finetuning: request.finetuning,
    packing: false,
    ...(lora ?? {}),
    learning_rate: Math.max(...training.steps.map(({ lr }) => lr)),
    weight_decay: training.weight_decay,
    max_grad_norm: training.max_grad_norm,
    max_steps: numSteps,
    per_device_train_batch_size: data.packsPerMicroBatch,
    gradient_accumulation_steps: data.microBatchesPerStep,
    save_steps: 0,
    ...(request.outputDir === undefined ? {} : { output_dir: request.outputDir }),
    ...(request.gradientCodec === undefined ? {} : { gradient_codec: request.gradientCodec }),
    ...(request.fp32Master === undefined ? {} : { fp32_master: request.fp32Master }),
  }
  return parse(jobSpecSchema, spec, 'the golden job') as JobSpec
}

function modelIn(folder: string): string {
  const path = join(folder, 'model')
  if (existsSync(path)) return path
  throw new TunemeshError(
    'MODEL_NOT_FOUND',
    `${folder} has no model. Give its path: the model of examples/drug-names, for instance.`,
  )
}

/** All rows of batches.safetensors: int64 tensors `input_ids.k` and `labels.k`. */
function readBatches(folder: string): LabelledIds[] {
  const path = join(folder, 'batches.safetensors')
  if (!existsSync(path)) {
    const names = existsSync(folder) ? readdirSync(folder).slice(0, 5).join(', ') : 'nothing'
    throw new TunemeshError('JOB_INVALID', `${path} is missing; the folder has ${names}.`)
  }
  const bytes = readFileSync(path)
  const headerBytes = Number(bytes.readBigUInt64LE())
  const header = JSON.parse(bytes.toString('utf8', 8, 8 + headerBytes)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: number[] }
  >
  const rowsOf = (name: string): Int32Array[] => {
    const entry = header[name]
    const [numRows = 0, length = 0] = entry?.shape ?? []
    if (entry?.dtype !== 'I64' || entry.shape.length !== 2) {
      throw new TunemeshError('JOB_INVALID', `${path} has no int64 matrix ${name}.`)
    }
    const start = 8 + headerBytes + (entry.data_offsets[0] ?? 0)
    return Array.from({ length: numRows }, (_, row) =>
      Int32Array.from({ length }, (_, i) =>
        Number(bytes.readBigInt64LE(start + 8 * (row * length + i))),
      ),
    )
  }
  const rows: LabelledIds[] = []
  for (let batch = 0; `input_ids.${batch}` in header; batch += 1) {
    const labels = rowsOf(`labels.${batch}`)
    for (const [row, ids] of rowsOf(`input_ids.${batch}`).entries()) {
      rows.push({ ids, labels: labels[row] ?? new Int32Array(ids.length) })
    }
  }
  return rows
}

const noTokenizer = (vocabSize: number): PreparedJob['tokenizer'] => ({
  stopIds: [],
  bosId: null,
  eosId: null,
  padId: null,
  chatTemplate: null,
  vocabSize,
})

const reportOf = (train: PreparedJob['train'], numRows: number): PreparedJob['report'] => ({
  numRows,
  numUsedRows: numRows,
  numTokens: train.numTokens,
  numTargetTokens: train.numTargetTokens,
  numPacks: train.numPacks,
  numValidationRows: 0,
  numTruncatedRows: 0,
  numDroppedRows: 0,
  histogram: [],
  stopTokenTrained: false,
  samples: [],
  findings: [],
  kind: 'text',
})
