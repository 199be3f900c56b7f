/** Checkpoints, evaluation and the end of a run: what happens beside the steps. PROTOCOL.md §8. */
import type { CheckpointRecord } from '../proto/commit-record.js'
import type { Delivered__Output } from '../proto/gen/tunemesh/v1/Delivered.js'
import type { EvaluationResult__Output } from '../proto/gen/tunemesh/v1/EvaluationResult.js'
import type { StateUploaded__Output } from '../proto/gen/tunemesh/v1/StateUploaded.js'
import type { RunFailure } from './run-events.js'
import { append, checkpointStep } from './run-log.js'
import { type FleetWorker, fail, finish, log, members, type Run, send } from './run-state.js'

/** Marks what is due at a step that has just been committed. */
export function noteCadence(run: Run, step: number): void {
  const { checkpointEverySteps } = run.config
  if (checkpointEverySteps > 0 && step % checkpointEverySteps === 0) run.isCheckpointDue = true
}

/** Right after the commit of `step` went out, so that the worker acts before it goes on. */
export function beginWorkAt(run: Run, step: number): void {
  if (run.isCheckpointDue && !run.checkpoint && !run.pause) beginCheckpoint(run, step)
  if (isEvaluationDue(run, step)) beginEvaluation(run, step)
}

function isEvaluationDue(run: Run, step: number): boolean {
  const { evaluateEverySteps, evaluateOnStart, evaluationSplits } = run.config
  if (evaluationSplits.length === 0 || run.evaluation) return false
  if (step === 0) return evaluateOnStart
  return step === run.order.numSteps || (evaluateEverySteps > 0 && step % evaluateEverySteps === 0)
}

/** One worker judges every validation set, at the weights of `step`. */
function beginEvaluation(run: Run, step: number): void {
  // Not the worker that writes the checkpoint, where there is another.
  const worker = members(run).find((w) => w.workerId !== run.checkpoint?.workerId) ?? donor(run)
  if (!worker) return
  const { jobId, evaluationSplits } = run.config
  run.evaluation = { workerId: worker.workerId, step, splits: new Set(evaluationSplits) }
  for (const split of evaluationSplits) {
    send(run, worker.workerId, { evaluate: { jobId, step, split } })
  }
}

export function beginCheckpoint(run: Run, step: number): void {
  const worker = donor(run)
  if (!worker || run.checkpoint) return
  run.isCheckpointDue = false
  run.checkpoint = {
    step,
    workerId: worker.workerId,
    stage: 'uploading',
    sinceMs: run.nowMs,
    stateDigest: '',
    sizeBytes: 0,
    weightsSha256: '',
  }
  send(run, worker.workerId, {
    uploadState: { jobId: run.config.jobId, step, purpose: 'checkpoint' },
  })
}

const donor = (run: Run): FleetWorker | undefined =>
  members(run).find((worker) => worker.loadingStep === null)

export function recordUploaded(run: Run, workerId: string, message: StateUploaded__Output): void {
  const work = run.checkpoint
  if (work?.stage !== 'uploading') return
  if (work.workerId !== workerId || work.step !== message.step) return
  if (message.error) {
    run.checkpoint = null
    if (message.error.code === 'DISK_FULL') {
      return pause(run, { code: 'DISK_FULL', message: message.error.message })
    }
    log(run, 'warn', `checkpoint of step ${work.step}: ${message.error.message}; tried again later`)
    run.isCheckpointDue = true
    return
  }
  work.stage = 'storing'
  work.stateDigest = message.digest
  work.sizeBytes = message.sizeBytes
  work.weightsSha256 = message.weightsSha256
  run.effects.push({
    kind: 'storeCheckpoint',
    manifest: {
      jobId: run.config.jobId,
      step: work.step,
      stateDigest: work.stateDigest,
      sizeBytes: work.sizeBytes,
      weightsSha256: work.weightsSha256,
      commitSequence: run.log.commits.get(work.step)?.sequence ?? 0,
    },
  })
}

/** The manifest is durable: only now may the log say that the checkpoint exists. */
export function recordStored(run: Run, step: number, manifestDigest: string): void {
  const work = run.checkpoint
  if (work?.stage !== 'storing' || work.step !== step) return
  if (step > run.log.committedStep) {
    // Rolled back meanwhile: a checkpoint of a step that is no longer true.
    run.checkpoint = null
    return
  }
  work.stage = 'recording'
  append(run, {
    kind: 'checkpoint',
    step,
    manifestDigest,
    stateDigest: work.stateDigest,
    weightsSha256: work.weightsSha256,
    sizeBytes: work.sizeBytes,
  })
}

export function recordStoreFailed(run: Run, step: number, failure: RunFailure): void {
  if (run.checkpoint?.step !== step || run.checkpoint.stage !== 'storing') return
  run.checkpoint = null
  pause(run, failure)
}

export function checkpointStands(run: Run, record: CheckpointRecord): void {
  const seconds = (run.nowMs - (run.checkpoint?.sinceMs ?? run.nowMs)) / 1000
  if (run.checkpoint?.step === record.step) run.checkpoint = null
  run.effects.push({
    kind: 'event',
    event: {
      checkpoint: {
        step: record.step,
        manifestDigest: record.manifestDigest,
        seconds,
        sizeBytes: record.sizeBytes,
      },
    },
  })
  if (run.pause) unpause(run)
}

/** The last checkpoint stays; the job stands still until there is room, or is told to go on. */
function pause(run: Run, failure: RunFailure): void {
  const isNew = run.pause === null
  run.pause = { failure, retryAtMs: run.nowMs + run.config.limits.checkpointRetryMs }
  run.isCheckpointDue = true
  if (!isNew) return
  run.effects.push({
    kind: 'event',
    event: { stateChanged: { state: 'PAUSED', error: { ...failure, details: [] } } },
  })
}

function unpause(run: Run): void {
  run.pause = null
  run.effects.push({ kind: 'event', event: { stateChanged: { state: 'RUNNING', error: null } } })
}

export function recordEvaluation(
  run: Run,
  workerId: string,
  message: EvaluationResult__Output,
): void {
  const work = run.evaluation
  if (work?.workerId !== workerId || work.step !== message.step) return
  if (message.error) {
    run.evaluation = null
    return log(run, 'warn', `evaluation of step ${work.step}: ${message.error.message}; left out`)
  }
  if (!work.splits.delete(message.split)) return
  if (work.splits.size === 0) run.evaluation = null
  run.effects.push({
    kind: 'event',
    event: {
      evaluation: {
        step: message.step,
        loss: message.lossSum / Math.max(1, message.numTargetTokens),
        numTargetTokens: message.numTargetTokens,
        split: message.split,
      },
    },
  })
}

/**
 * Every step is committed: all replicas have reported the same weights, the last checkpoint stands,
 * then one worker writes the result.
 */
export function concludeRun(run: Run): void {
  const last = run.order.numSteps
  if (members(run).some((worker) => worker.appliedStep < last)) return
  if (checkpointStep(run.log) < last) {
    if (!run.pause || run.nowMs >= run.pause.retryAtMs) beginCheckpoint(run, last)
    return
  }
  if (run.evaluation || run.delivery) return
  const worker = members(run)[0]
  if (!worker) return
  run.delivery = { workerId: worker.workerId, sinceMs: run.nowMs }
  const { jobId, outputDir, baseModelName } = run.config
  send(run, worker.workerId, { deliver: { jobId, outputDir, baseModelName } })
}

export function recordDelivered(run: Run, workerId: string, message: Delivered__Output): void {
  if (run.delivery?.workerId !== workerId) return
  const expected = run.log.checkpoint?.weightsSha256 ?? ''
  if (expected !== '' && message.weightsSha256 !== '' && expected !== message.weightsSha256) {
    return fail(run, {
      code: 'DIGEST_MISMATCH',
      message:
        `worker ${workerId} delivered weights ${message.weightsSha256}, ` +
        `the last checkpoint has ${expected}`,
    })
  }
  finish(run, {
    kind: 'succeeded',
    step: run.log.committedStep,
    weightsSha256: message.weightsSha256,
    artifacts: message.artifacts,
    weightChangeJson: message.weightChangeJson,
  })
}

/**
 * Stops after a checkpoint of the last committed step, or at once where there is nothing new to
 * keep.
 */
export function concludeStop(run: Run): void {
  const step = run.log.committedStep
  // What is being computed again stands in the log; a resume computes it again likewise.
  const isReplaying = run.plannedThrough < step
  const isKept = checkpointStep(run.log) >= step || isReplaying
  const canKeep = run.phase === 'running' && members(run).some((w) => w.appliedStep >= step)
  if (!isKept && canKeep && !run.pause) return beginCheckpoint(run, step)
  if (run.checkpoint) return
  if (!isKept && run.phase === 'running' && !run.pause) return
  finish(run, { kind: 'stopped', step, checkpointStep: checkpointStep(run.log) })
}
