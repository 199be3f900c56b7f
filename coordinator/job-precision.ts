/**
 * The precision that a job computes in: settled once, when it is planned, by the workers there are;
 * and which workers can compute in it.
 */
import { once } from 'node:events'
import { TunemeshError } from '../proto/errors.js'
import type { JobSpec } from '../proto/job-spec.js'
import type { Precision, StateType } from '../proto/train-spec.js'
import type { Mesh } from './coordinator.js'
import type { Fleet, FleetWorker } from './fleet.js'
import type { JobRecord } from './job-store.js'
import type { PreparedJob, SettledJob } from './prepared-job.js'
import { anyWorker } from './worker-calls.js'

/** By `bf16`, `load_in_fp8` and `optim` of the job file. */
export function askedPrecision(spec: JobSpec): PreparedJob['precision'] {
  const { bf16, load_in_fp8, optim } = spec
  if (load_in_fp8) return 'fp8'
  if (optim === 'adamw_8bit') return 'bf16'
  return bf16 === 'auto' ? 'auto' : bf16 ? 'bf16' : 'fp32'
}

/** Nothing else in the job file asks for bfloat16. */
const isByOptimizer = ({ optim, bf16 }: JobSpec): boolean => optim === 'adamw_8bit' && bf16 !== true

/** Where the job file asks for it; empty: nowhere. */
export const placeOfPrecision = (spec: JobSpec, places: ReadonlyMap<string, string>): string =>
  places.get(spec.load_in_fp8 ? 'load_in_fp8' : isByOptimizer(spec) ? 'optim' : 'bf16') ?? ''

/** Every device computes in float32. */
export const canCompute = ({ hello }: FleetWorker, precision: Precision): boolean =>
  precision === 'fp32' || hello.precisions.includes(precision)

/**
 * What `asked` means to these workers. `auto` is bf16 where each of them can, so that none is left
 * out. null: whoever is still expected decides.
 * @throws TunemeshError JOB_INVALID where bf16 or fp8 is asked for and no worker has it
 */
export function precisionAmong(
  workers: readonly FleetWorker[],
  asked: PreparedJob['precision'],
  isEveryoneHere: boolean,
): Precision | null {
  if (asked === 'fp32') return 'fp32'
  const wanted = asked === 'auto' ? 'bf16' : asked
  const able = workers.filter((worker) => canCompute(worker, wanted))
  if (asked === 'auto') {
    if (able.length < workers.length) return 'fp32'
    return isEveryoneHere && workers.length > 0 ? 'bf16' : null
  }
  if (able.length > 0) return asked
  if (isEveryoneHere && workers.length > 0) throw noneCan(workers, asked)
  return null
}

export interface SettleOptions {
  /** How long the first worker may take, and how long others may after it. */
  waitMs: number
  gatherMs: number
  /** Workers that are expected: those that this coordinator starts. */
  wanted: number
  signal?: AbortSignal
}

/** Waits for as many workers as the answer takes. */
export async function settlePrecision(
  fleet: Fleet,
  asked: PreparedJob['precision'],
  { waitMs, gatherMs, wanted, signal }: SettleOptions,
): Promise<Precision> {
  if (asked === 'fp32') return asked
  await anyWorker(fleet, { waitMs, signal })
  const over = AbortSignal.timeout(gatherMs)
  for (;;) {
    const isEveryoneHere = over.aborted || fleet.workers.length >= wanted
    const precision = precisionAmong(fleet.workers, asked, isEveryoneHere)
    if (precision !== null) return precision
    // Everyone has left again: the next one is waited for.
    if (over.aborted) await anyWorker(fleet, { waitMs, signal })
    else await nextAttached(fleet, over, signal)
  }
}

/** Or the end of the time for it. */
async function nextAttached(fleet: Fleet, over: AbortSignal, signal?: AbortSignal): Promise<void> {
  const either = signal === undefined ? over : AbortSignal.any([over, signal])
  await once(fleet, 'attached', { signal: either }).catch(() => signal?.throwIfAborted())
}

/** What its trained weights and moments are kept in. */
export function statesOf({ spec, precision }: SettledJob): StateType {
  if (spec.finetuning !== 'full' || precision !== 'bf16' || spec.fp32_master) return 'fp32'
  return spec.optim === 'adamw_8bit' ? 'bf16_8bit' : 'bf16'
}

/** Jobs of earlier versions do not say: there was no other mode. */
export const isDeterministic = ({ deterministic }: Partial<JobSpec>): boolean =>
  deterministic !== false

/** The job as it is planned and run. */
export const settled = (prepared: PreparedJob, precision: Precision): SettledJob => ({
  ...prepared,
  precision,
})

/**
 * Before anything is read or taken: `bf16: true` or `load_in_fp8: true` where the workers that are
 * here, or that this coordinator is about to start, are known not to have it.
 * @throws TunemeshError JOB_INVALID
 */
export function assertCanBegin(
  { fleet, options }: Pick<Mesh, 'fleet' | 'options'>,
  spec: JobSpec,
  place: string,
): void {
  const asked = askedPrecision(spec)
  if (asked === 'auto' || asked === 'fp32') return
  const { workers } = fleet
  const isKnown = workers.length > 0 || (options.numWorkers > 0 && options.device === 'cpu')
  if (isKnown && !workers.some((worker) => canCompute(worker, asked))) {
    throw noneCan(workers, isByOptimizer(spec) ? 'adamw_8bit' : asked, place)
  }
}

/** What to attach, and what to do without it. */
const needs = {
  bf16: {
    asks: 'bf16: true needs a GPU',
    advice:
      'Use bf16: auto, which is float32 here, or attach a worker with a GPU: ' +
      'tunemesh worker --device cuda:0.',
  },
  adamw_8bit: {
    asks: 'optim: adamw_8bit needs a GPU',
    advice: 'Use optim: adamw, or attach a worker with a GPU: tunemesh worker --device cuda:0.',
  },
  fp8: {
    asks: 'load_in_fp8: true needs a Hopper GPU (H100, H200) with cuBLASLt 12.9 or newer',
    advice: 'Leave load_in_fp8 out, or attach such a worker: tunemesh worker --device cuda:0.',
  },
}

function noneCan(
  workers: readonly FleetWorker[],
  asked: keyof typeof needs,
  place = '',
): TunemeshError {
  const who =
    workers.length === 0
      ? 'the workers started here use the CPU'
      : workers.length === 1
        ? `worker ${workers[0]?.id} computes on "${workers[0]?.hello.device}"`
        : `none of ${workers.length} workers has one, such as ${workers[0]?.id} on ` +
          `"${workers[0]?.hello.device}"`
  return new TunemeshError(
    'JOB_INVALID',
    `${place === '' ? '' : `${place} `}${needs[asked].asks}; ${who}. ${needs[asked].advice}`,
  )
}

/**
 * A worker for a job whose precision is settled. Where none can compute in it, others get a moment
 * to come back; then what is missing is told.
 * @throws TunemeshError NO_WORKERS
 */
export async function workerFor(
  { fleet, options, events }: Mesh,
  { jobId }: JobRecord,
  { precision, gatherMs, ...wait }: WorkerWait,
): Promise<FleetWorker> {
  const isAble = (worker: FleetWorker) => canCompute(worker, precision)
  await anyWorker(fleet, wait)
  try {
    return await anyWorker(fleet, { ...wait, waitMs: gatherMs, isAble })
  } catch (error) {
    if (!(error instanceof TunemeshError) || error.code !== 'NO_WORKERS') throw error
  }
  const message =
    `This job began in ${precision}, in which no worker here can compute: ` +
    `${fleet.workers.map(({ id, hello }) => `${id} on "${hello.device}"`).join(', ')}. ` +
    'Attach one with a GPU: tunemesh worker --device cuda:0.'
  if (options.numWorkers > 0) throw new TunemeshError('NO_WORKERS', message)
  events.append(jobId, { log: { level: 'warn', message } })
  return anyWorker(fleet, { ...wait, isAble })
}

interface WorkerWait {
  precision: Precision
  waitMs: number
  gatherMs: number
  signal: AbortSignal
}
