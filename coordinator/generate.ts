/**
 * Text from a model on one of the workers: template and tokenizer in a thread here, tokens from
 * there.
 */
import { existsSync, readFileSync } from 'node:fs'
import { mkdir, rename, rm, symlink } from 'node:fs/promises'
import { hostname } from 'node:os'
import { dirname, isAbsolute, join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import type { GenerateRequest__Output } from '../proto/gen/tunemesh/v1/GenerateRequest.js'
import type { GenerateResponse } from '../proto/gen/tunemesh/v1/GenerateResponse.js'
import type { Precision } from '../proto/train-spec.js'
import { borrowTokenizer } from './answer-tokenizer.js'
import type { Mesh } from './coordinator.js'
import type { FleetWorker } from './fleet.js'
import { type BaseModel, readBaseModel } from './ingest-model.js'
import { canCompute } from './job-precision.js'
import type { JobRecord } from './job-store.js'
import { describeFolder, describeModel, offerFiles, undigested } from './model-files.js'
import { loadPrepared } from './prepared-blob.js'
import type { TokenizerPool } from './tokenizer-pool.js'
import { askGenerate, idleWorker } from './worker-calls.js'

/** Where workers are expected; elsewhere one that is coming back still gets its chance. */
const workerWaitMs = 60_000
const uncertainWaitMs = 1_000
const maxNewTokens = 4_096
const defaultNewTokens = 256

interface ModelChoice {
  modelPath: string
  /** PEFT folder; empty: the base model alone. */
  adapterPath: string
  /** Beyond those that the model itself names. */
  stopIds: number[]
  /** Of the job; null: as the model is stored. */
  precision: Precision | null
}

export async function* generateText(
  mesh: Mesh,
  request: GenerateRequest__Output,
  signal: AbortSignal,
): AsyncGenerator<GenerateResponse> {
  const choice = await chooseModel(mesh, request)
  const model = readBaseModel(choice.modelPath, choice.modelPath)
  const wanted = choice.precision ?? storedPrecision(choice.modelPath)
  const { pool, release } = await borrowTokenizer(choice.modelPath)
  try {
    const promptIds = await promptIdsOf(request, pool)
    const { stopIds } = await pool.call('describe')
    const limit = request.maxNewTokens || defaultNewTokens
    const waitMs = mesh.options.numWorkers > 0 ? workerWaitMs : uncertainWaitMs
    const worker = await idleWorker(mesh.fleet, {
      waitMs,
      signal,
      prefers: (it) => canCompute(it, wanted),
    })
    const results = askGenerate(mesh.fleet, worker, {
      request: { ...request, maxNewTokens: Math.min(limit, maxNewTokens) },
      ...(await filesFor(mesh, worker, { model, adapterPath: choice.adapterPath })),
      modelConfigJson: JSON.stringify(model.config),
      precision: nearestPrecision(worker, wanted),
      promptIds,
      stopIds: [...new Set([...choice.stopIds, ...stopIds])],
    })
    yield* asText(results, pool, signal)
  } finally {
    release()
  }
}

/** Where the worker lacks an fp8 base, the nearest is the same model in bf16. */
const nearestPrecision = (worker: FleetWorker, wanted: Precision): Precision =>
  [wanted, 'bf16' as const].find((it) => wanted !== 'fp32' && canCompute(worker, it)) ?? 'fp32'

/** Text in whole characters: a token may end in the middle of one. */
async function* asText(
  results: ReturnType<typeof askGenerate>,
  pool: TokenizerPool,
  signal: AbortSignal,
): AsyncGenerator<GenerateResponse> {
  const ids: number[] = []
  let told = ''
  for await (const result of results) {
    if (signal.aborted) return
    ids.push(...result.tokenIds)
    const text = await pool.call('decodeAnswer', ids)
    const isWhole = result.done || !text.endsWith('\uFFFD')
    const piece = isWhole ? text.slice(told.length) : ''
    if (isWhole) told = text
    const { tokenIds, done, finishReason } = result
    yield { text: piece, tokenIds, done, finishReason }
  }
}

async function chooseModel(mesh: Mesh, request: GenerateRequest__Output): Promise<ModelChoice> {
  if (request.jobId === '') {
    if (request.model === '') throw invalid('Name a model or a job.')
    if (!isAbsolute(request.model)) throw invalid(`Model path ${request.model} is not absolute.`)
    const { model: modelPath, adapterDir: adapterPath } = request
    return { modelPath, adapterPath, stopIds: [], precision: null }
  }
  const job = mesh.store.get(request.jobId)
  if (job.state !== 'SUCCEEDED') {
    throw new TunemeshError(
      'STATE_CONFLICT',
      `Job ${job.jobId} is ${job.state}; it has a result only once it has succeeded.`,
    )
  }
  const prepared = await loadPrepared(mesh.blobs, job.preparedDigest)
  const { stopIds } = prepared.tokenizer
  const result = await resultFolder(mesh, job)
  const precision = job.precision || (prepared.precision === 'auto' ? 'fp32' : prepared.precision)
  const model = request.model || prepared.modelPath
  return prepared.spec.finetuning === 'full'
    ? { modelPath: result, adapterPath: '', stopIds, precision }
    : { modelPath: model, adapterPath: result, stopIds, precision }
}

/** A model that is kept in float32 is not rounded; 16-bit and quantised ones lose nothing. */
function storedPrecision(modelPath: string): Precision {
  const configPath = join(modelPath, 'config.json')
  if (!existsSync(configPath)) return 'bf16'
  const config = JSON.parse(readFileSync(configPath, 'utf8')) as {
    torch_dtype?: unknown
    dtype?: unknown
  }
  const dtype = config.torch_dtype ?? config.dtype
  return dtype === 'float32' ? 'fp32' : 'bf16'
}

/** Digests only for a worker of another machine: hashing a large model takes long. */
async function filesFor(
  { blobs }: Mesh,
  worker: FleetWorker,
  { model, adapterPath }: { model: BaseModel; adapterPath: string },
) {
  const paths = { modelPath: model.path, adapterPath }
  if (worker.hello.host === hostname()) return { ...paths, modelFiles: undigested(model) }
  const { modelFiles } = await describeModel(model)
  const adapterFiles = adapterPath === '' ? [] : await describeFolder(adapterPath)
  await offerFiles(blobs, model.path, modelFiles)
  await offerFiles(blobs, adapterPath, adapterFiles)
  return { ...paths, modelFiles, adapterFiles }
}

/**
 * The job's files by their names again, from the blob store: the output folder may have been moved.
 */
async function resultFolder(mesh: Mesh, job: JobRecord): Promise<string> {
  const folder = join(mesh.folder.tempDir, `result-${job.jobId}`)
  const part = `${folder}.${crypto.randomUUID()}`
  for (const artifact of job.artifacts) {
    const path = join(part, artifact.path ?? '')
    await mkdir(dirname(path), { recursive: true })
    await symlink(mesh.blobs.pathOf(artifact.digest ?? ''), path)
  }
  await rm(folder, { recursive: true, force: true })
  await rename(part, folder)
  return folder
}

async function promptIdsOf(
  request: GenerateRequest__Output,
  pool: TokenizerPool,
): Promise<number[]> {
  if (request.promptIds.length > 0) return request.promptIds
  if (request.messages.length === 0) return pool.call('encode', request.prompt, true)
  return (await pool.call('chatPrompt', request.messages)).ids
}

const invalid = (message: string) => new TunemeshError('JOB_INVALID', message)
