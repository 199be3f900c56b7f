/** One run of a job, from its place in the queue to its result on disk. */
import { existsSync } from 'node:fs'
import { DataOrder } from '../proto/data-order.js'
import { TunemeshError } from '../proto/errors.js'
import { failpoint } from '../proto/failpoint.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import { readGguf } from '../proto/gguf-metadata.js'
import type { SliceLayout } from '../proto/slices.js'
import type { Mesh } from './coordinator.js'
import { workerMessage } from './fleet-report.js'
import { companionsOfGguf } from './gguf-companions.js'
import { planOn, settleJob, wantedWorkers } from './job-ingest.js'
import { planResponseOf, prepareMessage } from './job-plan.js'
import { isDeterministic, settled, workerFor } from './job-precision.js'
import type { JobQueue, RunningJob } from './job-queue.js'
import { JobRunner } from './job-runner.js'
import type { JobRecord, JobState } from './job-store.js'
import { offerFiles } from './model-files.js'
import type { NatsConnection } from './nats-connection.js'
import { deliver, runRecordName } from './output-folder.js'
import { loadPrepared } from './prepared-blob.js'
import type { PreparedJob, SettledJob } from './prepared-job.js'
import { defaultRunLimits, type RunConfig, type RunLimits, type RunOutcome } from './run-events.js'
import { runRecord } from './run-record.js'
import { untoldSteps } from './untold-steps.js'

export interface RunParts {
  mesh: Mesh
  connection: NatsConnection
  job: JobRecord
  queue: JobQueue
  /** Resolves when the job is stored as RUNNING. */
  told: Promise<unknown>
  /** Another coordinator owns the job: this one must end. */
  lose: (error: TunemeshError) => void
}

export function startRun(parts: RunParts): RunningJob {
  const abort = new AbortController()
  let runner: JobRunner | null = null
  const asked: { stop: { now: boolean } | null } = { stop: null }
  const outcome = (async () => {
    await parts.told
    parts.mesh.fleet.want()
    const planned = await plan(parts, abort.signal)
    await tellUntoldSteps(parts, runConfig(parts.mesh, parts.job, planned))
    runner = runnerFor(parts, planned)
    if (asked.stop !== null) runner.stop(asked.stop.now)
    const unwatch = parts.connection.onStatus((isUp) => runner?.busChanged(isUp))
    try {
      return await settle(parts, planned.prepared, await runner.run())
    } finally {
      unwatch()
    }
  })().catch((error) => {
    if (!abort.signal.aborted || !isStop(error)) throw error
    return { state: 'STOPPED' as const }
  })
  return {
    outcome,
    stop: (now) => {
      asked.stop = { now }
      if (runner === null) abort.abort()
      else runner.stop(now)
    },
    resume: () => runner?.resume(),
  }
}

/** What a stop makes planning fail with; a job that can not run is a failure all the same. */
const isStop = (error: { code?: string; name?: string }) =>
  error.code === 'JOB_STOPPED' || error.name === 'AbortError'

interface Planned {
  prepared: SettledJob
  layout: SliceLayout
}

/**
 * Waits for a first worker and asks its engine what the job takes; refuses a job that does not fit.
 */
async function plan(parts: RunParts, signal: AbortSignal): Promise<Planned> {
  const { mesh, job } = parts
  const stored = await loadPrepared(mesh.blobs, job.preparedDigest)
  await offerFiles(mesh.blobs, stored.modelPath, stored.modelFiles)
  await offerFiles(mesh.blobs, stored.startAdapter ?? '', stored.startAdapterFiles)
  const { noWorkersMs: waitMs, gatherMs } = limitsOf(mesh)
  const prepared = await settlePrecisionOf(parts, stored, { waitMs, signal })
  const { precision } = prepared
  const worker = await workerFor(mesh, job, { precision, waitMs, gatherMs, signal })
  const { answer, layout } = await planOn(mesh, worker, prepared)
  const numWorkers = wantedWorkers(mesh, precision)
  mesh.events.append(job.jobId, { plan: planResponseOf(prepared, answer, { numWorkers, worker }) })
  signal.throwIfAborted()
  return { prepared, layout }
}

/** Once in a job's life, and stored: whoever goes on with it computes as it began. */
async function settlePrecisionOf(
  { mesh, job }: RunParts,
  prepared: PreparedJob,
  wait: { waitMs: number; signal: AbortSignal },
): Promise<SettledJob> {
  const known = mesh.store.get(job.jobId).precision
  if (known) return settled(prepared, known)
  const begun = await settleJob(mesh, prepared, wait)
  await mesh.store.update(job.jobId, () => ({ precision: begun.precision }))
  return begun
}

/** Of an earlier coordinator's run, which ended between a commit and its event. */
async function tellUntoldSteps(parts: RunParts, config: RunConfig): Promise<void> {
  const { mesh, job } = parts
  const log = await mesh.commitLog.readAll(job.jobId)
  if (log.length === 0) return
  const events = await mesh.events.readAll(job.jobId)
  const order = new DataOrder(config.dataOrder)
  const untold = untoldSteps({
    log,
    told: new Set(events.flatMap(({ step, stepSkipped }) => (step ?? stepSkipped)?.step ?? [])),
    numSteps: order.numSteps,
    dataEpochsThrough: (step) => order.dataEpochsThrough(step),
  })
  for (const event of untold) onRunEvent(parts, event)
}

function runnerFor(parts: RunParts, planned: Planned): JobRunner {
  const { mesh, job } = parts
  const { fleet, commitLog, checkpoints, nowMs } = mesh
  return new JobRunner({
    config: runConfig(mesh, job, planned),
    fleet,
    commitLog,
    checkpoints,
    numCheckpointsKept: planned.prepared.spec.save_total_limit,
    nowMs,
    log: mesh.log.child({ jobId: job.jobId }),
    onEvent: (event) => onRunEvent(parts, event),
  })
}

function runConfig(mesh: Mesh, job: JobRecord, { prepared, layout }: Planned): RunConfig {
  const { spec, train, validations, schedule } = prepared
  return {
    jobId: job.jobId,
    coordinatorId: mesh.coordinatorId,
    dataOrder: {
      seed: spec.seed,
      numPacks: train.numPacks,
      packsPerMicroBatch: schedule.packsPerMicroBatch,
      microBatchesPerStep: schedule.microBatchesPerStep,
      numEpochs: spec.num_train_epochs,
      // The schedule is what preflight promised, so its length rules.
      maxSteps: schedule.numSteps,
      explicitOrder: schedule.explicitOrder,
    },
    targetsPerPack: train.targetsPerPack,
    tokensPerPack: train.tokensPerPack,
    learningRates: schedule.learningRates,
    beta1: spec.adam_beta1,
    beta2: spec.adam_beta2,
    maxGradNorm: spec.max_grad_norm,
    onNonFinite: spec.on_non_finite,
    checkpointEverySteps: spec.save_steps,
    evaluateEverySteps: spec.eval_steps,
    evaluateOnStart: spec.eval_on_start,
    evaluationSplits: validations.map(({ name }) => name),
    prepare: prepareMessage({ jobId: job.jobId, prepared, layout }),
    outputDir: job.outputDir,
    baseModelName: spec.model,
    precision: prepared.precision,
    isDeterministic: isDeterministic(spec),
    wantedWorkers: wantedWorkers(mesh, prepared.precision),
    limits: limitsOf(mesh),
  }
}

const limitsOf = ({ options }: Mesh): RunLimits => ({
  ...defaultRunLimits,
  deadAfterMs: options.tuning.deadAfterMs,
  ...definedOnly(options.tuning.limits),
})

const definedOnly = (limits: object) =>
  Object.fromEntries(
    Object.entries(limits).filter(([, value]) => value !== undefined),
  ) as Partial<RunLimits>

/** Steps and shares are shown at once, pauses are stored; everything goes into the event log. */
function onRunEvent({ mesh, job, queue }: RunParts, event: JobEvent): void {
  mesh.events.append(job.jobId, withWorkers(mesh, event))
  if (event.step) {
    const { step = 0, loss = 0, shares = [] } = event.step
    mesh.store.note(job.jobId, { step, lastLoss: Number(loss) })
    const total = shares.reduce((sum, share) => sum + (share.numMicroBatches ?? 0), 0)
    for (const { workerId = '', numMicroBatches = 0, tokensPerSecond = 0 } of shares) {
      const share = total === 0 ? 0 : numMicroBatches / total
      mesh.fleet.count(workerId, { share, tokensPerSecond: Number(tokensPerSecond) })
    }
  }
  if (event.stepSkipped) mesh.store.note(job.jobId, { step: event.stepSkipped.step ?? 0 })
  if (event.stateChanged) {
    const { state, error } = event.stateChanged
    const change = {
      state: state as JobState,
      error: error
        ? { code: error.code ?? 'INTERNAL', message: error.message ?? '', details: [] }
        : null,
    }
    queue.noteRunState(job.jobId, change).catch((failure) => {
      mesh.log.warn({ err: failure }, 'a change of state could not be stored')
    })
  }
}

/** The machine knows of a worker what its decisions need; the fleet knows the rest. */
function withWorkers({ fleet, nowMs }: Mesh, event: JobEvent): JobEvent {
  if (!event.fleet) return event
  const workers = (event.fleet.workers ?? []).map((told) => {
    const worker = fleet.get(told.workerId ?? '')
    if (worker === undefined) return told
    const { state = '', deviceClass = '' } = told
    return { ...workerMessage(worker, nowMs()), state, deviceClass }
  })
  return { ...event, fleet: { ...event.fleet, workers } }
}

async function settle(
  parts: RunParts,
  prepared: SettledJob,
  outcome: RunOutcome,
): Promise<Partial<JobRecord> & { state: JobState }> {
  switch (outcome.kind) {
    case 'succeeded':
      return settleSuccess(parts, prepared, outcome)
    case 'stopped':
      return { state: 'STOPPED', step: outcome.step }
    case 'failed':
      return {
        state: 'FAILED',
        step: outcome.step,
        error: { code: outcome.failure.code, message: outcome.failure.message, details: [] },
      }
    case 'fenced': {
      const error = new TunemeshError(
        'STATE_CONFLICT',
        `Coordinator ${outcome.byCoordinatorId} has taken over job ${parts.job.jobId}.`,
      )
      parts.lose(error)
      throw error
    }
  }
}

async function settleSuccess(
  { mesh, job }: RunParts,
  prepared: SettledJob,
  outcome: RunOutcome & { kind: 'succeeded' },
): Promise<Partial<JobRecord> & { state: JobState }> {
  const { artifacts, weightsSha256, step } = outcome
  await mesh.events.flush()
  const events = await mesh.events.readAll(job.jobId)
  const commits = await mesh.commitLog.readAll(job.jobId)
  const workers = mesh.fleet.list()
  const record = runRecord({ job, prepared, outcome, events, commits, workers })
  const { spec, modelPath, modelConfig } = prepared
  // A folder's own companions come with the worker's files.
  const isWholeFromGguf =
    spec.finetuning === 'full' && modelPath.endsWith('.gguf') && existsSync(modelPath)
  const companions = isWholeFromGguf
    ? companionsOfGguf(readGguf(modelPath), modelPath, modelConfig)
    : {}
  const texts = { ...companions, [runRecordName]: `${JSON.stringify(record, null, 2)}\n` }
  failpoint('coordinator.before-output')
  await deliver(mesh.blobs, { jobId: job.jobId, outputDir: job.outputDir, artifacts, texts })
  failpoint('coordinator.after-output')
  mesh.events.append(job.jobId, {
    artifacts: { artifacts, outputDir: job.outputDir, weightsSha256 },
  })
  const adapter = artifacts.find((artifact) => artifact.path === 'adapter_model.safetensors')
  return {
    state: 'SUCCEEDED',
    step,
    artifacts,
    weightsSha256,
    adapterDigest: adapter?.digest ?? '',
  }
}
