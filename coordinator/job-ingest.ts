/** Preflight of a job: ingest, and the plan that a worker's engine makes of it. */
import { TunemeshError } from '../proto/errors.js'
import type { PlanRequest__Output } from '../proto/gen/tunemesh/v1/PlanRequest.js'
import type { PlanResponse } from '../proto/gen/tunemesh/v1/PlanResponse.js'
import type { PlanResult__Output } from '../proto/gen/tunemesh/v1/PlanResult.js'
import { keyPlaces, readJobFile } from '../proto/job-file.js'
import type { SliceLayout } from '../proto/slices.js'
import type { Mesh } from './coordinator.js'
import type { FleetWorker } from './fleet.js'
import { prepareGoldenJob } from './golden-job.js'
import { prepareJob } from './ingest.js'
import { assertFits, layoutFor, planResponseOf, trainRequestJson } from './job-plan.js'
import type { JobRecord } from './job-store.js'
import type { PreparedJob } from './prepared-job.js'
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
  const prepared = await prepareJob({
    spec,
    baseDir: request.baseDir,
    jobFileName: fileName,
    keyPlaces: keyPlaces(file),
    putBlob: (pieces) => mesh.blobs.write(pieces),
  })
  const hasWorkers = mesh.options.numWorkers > 0 || mesh.fleet.workers.length > 0
  if (!hasWorkers) return planResponseOf(prepared, null, 0)
  const worker = await anyWorker(mesh.fleet, workerWaitMs)
  const { answer } = await planOn(mesh, worker, prepared)
  return planResponseOf(prepared, answer, wantedWorkers(mesh))
}

/** How many workers a job will have, as far as is known before it runs. */
export const wantedWorkers = ({ options, fleet }: Mesh): number =>
  Math.max(1, options.numWorkers, fleet.workers.length)

export interface WorkerPlan {
  answer: PlanResult__Output
  layout: SliceLayout
}

/**
 * @throws TunemeshError DEVICE_MEMORY_SHORT with the nearest settings that fit; JOB_INVALID where
 *   the worker's device lacks the job's precision
 */
export async function planOn(
  mesh: Mesh,
  worker: FleetWorker,
  prepared: PreparedJob,
): Promise<WorkerPlan> {
  assertPrecision(prepared, worker)
  const ask = async (job: PreparedJob): Promise<WorkerPlan> => {
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

function assertPrecision(prepared: PreparedJob, worker: FleetWorker): void {
  const { device } = worker.hello
  if (prepared.precision === 'fp32' || !device.startsWith('cpu')) return
  throw new TunemeshError(
    'JOB_INVALID',
    `bf16: true needs GPUs; worker ${worker.id} computes on "${device}". ` +
      'Leave bf16 out, or attach workers with --device cuda.',
  )
}

/**
 * The largest batch that fits, by asking the engine for smaller ones: the nearest setting, never
 * guessed.
 */
async function fittingBatch(
  prepared: PreparedJob,
  memoryBytes: number,
  ask: (job: PreparedJob) => Promise<WorkerPlan>,
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
