/** Preflight of a job: ingest, and the plan that a worker's engine makes of it. */
import type { PlanRequest__Output } from '../proto/gen/tunemesh/v1/PlanRequest.js'
import type { PlanResponse } from '../proto/gen/tunemesh/v1/PlanResponse.js'
import type { PlanResult__Output } from '../proto/gen/tunemesh/v1/PlanResult.js'
import { keyPlaces, readJobFile } from '../proto/job-file.js'
import type { SliceLayout } from '../proto/slices.js'
import type { Precision } from '../proto/train-spec.js'
import type { Mesh } from './coordinator.js'
import type { FleetWorker } from './fleet.js'
import { prepareGoldenJob } from './golden-job.js'
import { prepareJob } from './ingest.js'
import { assertFits, layoutFor, planResponseOf, trainRequestJson } from './job-plan.js'
import {
  assertCanBegin,
  canCompute,
  placeOfPrecision,
  settled,
  settlePrecision,
} from './job-precision.js'
import type { JobRecord } from './job-store.js'
import type { PreparedJob, SettledJob } from './prepared-job.js'
import { defaultRunLimits } from './run-events.js'
import { anyWorker, askPlan } from './worker-calls.js'

/** Where workers are expected, how long a plan waits for the first of them. */
const workerWaitMs = 60_000

export async function ingestJob(
  mesh: Mesh,
  job: JobRecord,
  signal: AbortSignal,
): Promise<PreparedJob> {
  const putBlob = (pieces: Iterable<Uint8Array>) => mesh.blobs.write(pieces)
  if (job.goldenJson !== '') return prepareGoldenJob(job.goldenJson, putBlob)
  const spec = JSON.parse(job.specJson) as PreparedJob['spec']
  const { baseDir, jobFileName, jobId } = job
  const file = { text: job.jobFile, fileName: jobFileName, overrides: job.overrides }
  return prepareJob({
    spec,
    baseDir,
    jobFileName,
    keyPlaces: keyPlaces(file),
    putBlob,
    signal,
    onProgress: (numRows) => mesh.log.debug({ jobId, numRows }, 'tokenising'),
  })
}

/** JobService.Plan: everything that Submit would find out; stores no job. */
export async function planRequest(mesh: Mesh, request: PlanRequest__Output): Promise<PlanResponse> {
  const fileName = request.jobFileName || 'job.yaml'
  const file = { text: request.jobFile, fileName, overrides: request.overrides }
  const spec = readJobFile(file)
  const places = keyPlaces(file)
  assertCanBegin(mesh, spec, placeOfPrecision(spec, places) || fileName)
  const prepared = await prepareJob({
    spec,
    baseDir: request.baseDir,
    jobFileName: fileName,
    keyPlaces: places,
    putBlob: (pieces) => mesh.blobs.write(pieces),
  })
  const hasWorkers = mesh.options.numWorkers > 0 || mesh.fleet.workers.length > 0
  if (!hasWorkers) return planResponseOf(prepared, null, { numWorkers: 0, worker: null })
  const job = await settleJob(mesh, prepared, { waitMs: workerWaitMs })
  const isAble = (worker: FleetWorker) => canCompute(worker, job.precision)
  const worker = await anyWorker(mesh.fleet, { waitMs: workerWaitMs, isAble })
  const { answer } = await planOn(mesh, worker, job)
  const numWorkers = wantedWorkers(mesh, job.precision)
  return planResponseOf(job, answer, { numWorkers, worker })
}

/** By the workers that are here, or expected soon. */
export async function settleJob(
  { fleet, options }: Mesh,
  prepared: PreparedJob,
  wait: { waitMs: number; signal?: AbortSignal },
): Promise<SettledJob> {
  const gatherMs = options.tuning.limits.gatherMs ?? defaultRunLimits.gatherMs
  const wanted = Math.max(1, options.numWorkers)
  const precision = await settlePrecision(fleet, prepared.precision, { ...wait, gatherMs, wanted })
  return settled(prepared, precision)
}

/** How many workers a job will have, as far as is known before it runs. */
export function wantedWorkers({ options, fleet }: Mesh, precision: Precision): number {
  const numAble = fleet.workers.filter((worker) => canCompute(worker, precision)).length
  const numUnable = fleet.workers.length - numAble
  return Math.max(1, options.numWorkers - numUnable, numAble)
}

export interface WorkerPlan {
  answer: PlanResult__Output
  layout: SliceLayout
}

/**
 * @param worker one that can compute in the job's precision
 * @throws TunemeshError DEVICE_MEMORY_SHORT with the nearest settings that fit
 */
export async function planOn(
  mesh: Mesh,
  worker: FleetWorker,
  prepared: SettledJob,
): Promise<WorkerPlan> {
  const ask = async (job: SettledJob): Promise<WorkerPlan> => {
    const { modelPath } = job
    // Measuring beside a job that trains would tell the wrong speed, and slow that job down.
    const isFree = worker.state === 'idle'
    const question = (layout: SliceLayout | null) =>
      askPlan(mesh.fleet, worker, {
        trainSpecJson: trainRequestJson(job, layout),
        modelPath,
        withSpeed: isFree && job === prepared && layout !== null,
      })
    // Slices follow from the size of the trained vector, which the engine tells first.
    const layout = layoutFor((await question(null)).numBlocks, mesh.options.tuning)
    return { answer: await question(layout), layout }
  }
  const plan = await ask(prepared)
  const memoryBytes = worker.hello.memoryBytes
  const needed = plan.answer.memory?.totalBytes ?? 0
  const isShort = memoryBytes > 0 && needed > memoryBytes
  const fitting = isShort ? await fittingBatch(prepared, memoryBytes, ask) : null
  assertFits(plan.answer, { id: worker.id, memoryBytes }, fitting)
  return plan
}

/**
 * The largest batch that fits, by asking the engine for smaller ones: the nearest setting, never
 * guessed.
 */
async function fittingBatch(
  prepared: SettledJob,
  memoryBytes: number,
  ask: (job: SettledJob) => Promise<WorkerPlan>,
): Promise<string | null> {
  const { packsPerMicroBatch } = prepared.schedule
  let fitting = 0
  let tooMany = packsPerMicroBatch
  while (tooMany - fitting > 1) {
    const packs = Math.floor((fitting + tooMany) / 2)
    const schedule = { ...prepared.schedule, packsPerMicroBatch: packs }
    const { answer } = await ask({ ...prepared, schedule })
    if ((answer.memory?.totalBytes ?? 0) <= memoryBytes) fitting = packs
    else tooMany = packs
  }
  if (fitting === 0) return null
  return `Lower per_device_train_batch_size from ${packsPerMicroBatch} to ${fitting}.`
}
