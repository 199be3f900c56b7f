/**
 * A worker's part in a job, as decisions only: events in, effects out; no clock, no sockets, no
 * chance. `advance` is the main path. The seeded simulation (test/simulation) runs this very code.
 * proto/PROTOCOL.md is normative; the other run-*.ts files hold the parts.
 */
import type { EpochRaised__Output } from '../proto/gen/tunemesh/v1/EpochRaised.js'
import type { LoadState__Output } from '../proto/gen/tunemesh/v1/LoadState.js'
import type { Prepare__Output } from '../proto/gen/tunemesh/v1/Prepare.js'
import type { StepPlan__Output } from '../proto/gen/tunemesh/v1/StepPlan.js'
import type { ToWorker__Output } from '../proto/gen/tunemesh/v1/ToWorker.js'
import { numSlices } from '../proto/slices.js'
import type { WorkerEffect, WorkerEvent, WorkerRunConfig } from './run-events.js'
import * as leases from './run-leases.js'
import * as slices from './run-slices.js'
import { isSettled, newWorkerRun, type PendingWork, send, type WorkerRun } from './run-state.js'
import * as sums from './run-sums.js'

/** Uploads, probes and evaluations that may wait for a step. */
const maxPending = 16

export class WorkerRunMachine {
  readonly run: WorkerRun

  constructor(config: WorkerRunConfig) {
    this.run = newWorkerRun(config)
  }

  /** What the shell must do next, in this order. */
  advance(event: WorkerEvent, nowMs: number): WorkerEffect[] {
    const { run } = this
    run.nowMs = nowMs
    run.effects = []
    take(run, event)
    if (run.jobId !== '') proceed(run)
    return run.effects
  }
}

/** Everything that may now happen: work at the present step, the next step, then its leases. */
function proceed(run: WorkerRun): void {
  answerPrepared(run)
  doPending(run)
  sums.applyNext(run)
  doPending(run)
  leases.computeNext(run)
  slices.advanceSlices(run)
  leases.sendContributions(run)
  sums.requestMissingSums(run)
}

function take(run: WorkerRun, event: WorkerEvent): void {
  switch (event.kind) {
    case 'message':
      return takeMessage(run, event.message)
    case 'attached':
      run.workerId = event.workerId
      return
    case 'detached':
      return
    case 'drainAsked':
      run.isDraining = true
      return send(run, { drain: { reason: event.reason } })
    case 'tick':
      return readLogInDoubt(run)
    case 'commitLogRead':
      return sums.recordCommitLog(run, event.records)
    case 'commitLogUnreadable':
      return
    default:
      return run.jobId === '' ? undefined : takeResult(run, event)
  }
}

type Result = Exclude<
  WorkerEvent,
  {
    kind:
      | 'message'
      | 'attached'
      | 'detached'
      | 'drainAsked'
      | 'tick'
      | 'commitLogRead'
      | 'commitLogUnreadable'
  }
>

function takeResult(run: WorkerRun, event: Result): void {
  switch (event.kind) {
    case 'enginePrepared':
      return recordEngine(run, event)
    case 'microBatchDone':
      return leases.recordMicroBatch(run, event)
    case 'microBatchFailed':
      return leases.recordFailure(run, event)
    case 'sliceReady':
      return leases.recordSlice(run, event)
    case 'contributionDelivered':
      return leases.recordDelivered(run, event)
    case 'contributionArrived':
      return slices.recordArrival(run, event)
    case 'sliceFinished':
      sums.recordSum(run, { ...event, digest: event.publishedDigest })
      return slices.recordFinished(run, event)
    case 'sumArrived':
      return sums.recordSum(run, event)
    case 'sumOverwritten':
      return sums.forgetSum(run, event)
    case 'sumRequested':
      return sums.serveSum(run, event)
    case 'sumUnavailable':
      return sums.recordRefusal(run, event)
    case 'updateApplied':
      return sums.recordApplied(run, event)
    case 'stateLoaded':
      return recordLoaded(run, event)
    case 'probeDone':
      return recordProbe(run, event)
    case 'stateUploaded':
    case 'evaluated':
    case 'delivered':
      return report(run, event)
    case 'engineFailed':
      return reportFailure(run, event)
  }
}

// ---- the coordinator's messages ----

function takeMessage(run: WorkerRun, message: ToWorker__Output): void {
  if (message.prepare) return takePrepare(run, message.prepare)
  if (message.shutdown) {
    run.effects.push({ kind: 'exit', reason: message.shutdown.reason })
    return
  }
  if (jobOf(message) !== run.jobId) return
  if (message.epoch) return takeEpoch(run, message.epoch)
  if (message.stepPlan) return takePlan(run, message.stepPlan)
  if (message.commit) return sums.recordCommit(run, message.commit)
  if (message.loadState) return takeLoad(run, message.loadState)
  if (message.releaseJob) return release(run)
  const work = pendingWork(message)
  if (work && run.pending.length < maxPending) run.pending.push(work)
}

const jobOf = (message: ToWorker__Output): string =>
  (message.message && (message[message.message] as { jobId?: string } | null)?.jobId) ?? ''

function pendingWork(message: ToWorker__Output): PendingWork | null {
  const { uploadState, probe, evaluate, deliver } = message
  if (uploadState) {
    return { kind: 'uploadState', step: uploadState.step, purpose: uploadState.purpose }
  }
  if (probe) return { kind: 'probe', step: probe.step, probe }
  if (evaluate) return { kind: 'evaluate', step: evaluate.step, evaluate }
  return deliver ? { kind: 'deliver', step: -1, deliver } : null
}

/**
 * The same job again after a lost stream: device state is kept, and told as soon as it stands
 * still.
 */
function takePrepare(run: WorkerRun, prepare: Prepare__Output): void {
  if (run.jobId === prepare.jobId && run.prepare) {
    run.owesPrepared = true
    run.pending = []
    // Announced before the stream was lost: what is still true is announced again.
    run.commits.clear()
    return
  }
  if (run.jobId !== '') release(run)
  run.jobId = prepare.jobId
  run.prepare = prepare
  run.owesPrepared = true
  run.appliedStep = 0
  run.appliedSequence = 0
  run.effects.push({ kind: 'prepareEngine', prepare })
}

function recordEngine(
  run: WorkerRun,
  event: Extract<WorkerEvent, { kind: 'enginePrepared' }>,
): void {
  if (!run.prepare || run.prepared) return
  run.prepared = event
  run.weightsSha256 = event.weightsSha256
  run.numSlices = numSlices({ numBlocks: event.numBlocks, sliceBlocks: run.prepare.sliceBlocks })
  sums.acceptSums(run)
}

function answerPrepared(run: WorkerRun): void {
  if (!run.owesPrepared || !run.prepared || !isSettled(run)) return
  run.owesPrepared = false
  const { planHash, memory, numBlocks, numTrainedParameters, deviceClass } = run.prepared
  send(run, {
    prepared: {
      jobId: run.jobId,
      planHash,
      memory,
      numBlocks,
      numTrainedParameters,
      fresh: run.appliedStep === 0,
      appliedStep: run.appliedStep,
      weightsSha256: run.weightsSha256,
      appliedSequence: run.appliedSequence,
      deviceClass,
    },
  })
  if (run.isDraining) send(run, { drain: { reason: 'asked before' } })
}

/** A raise voids the uncommitted step. Sums that stand here may be those of a committed one. */
function takeEpoch(run: WorkerRun, epoch: EpochRaised__Output): void {
  if (epoch.fleetEpoch < run.fleetEpoch) return
  run.workerIds = epoch.workerIds
  // Rolled back meanwhile.
  for (const step of run.commits.keys()) if (step > epoch.step) run.commits.delete(step)
  if (epoch.fleetEpoch > run.fleetEpoch) {
    run.fleetEpoch = epoch.fleetEpoch
    run.plans.clear()
    leases.voidLeases(run)
    slices.voidSlices(run)
  }
  run.effects.push({
    kind: 'openEpoch',
    fleetEpoch: epoch.fleetEpoch,
    workerIds: epoch.workerIds,
  })
}

function takePlan(run: WorkerRun, plan: StepPlan__Output): void {
  if (plan.fleetEpoch !== run.fleetEpoch) return
  if (plan.step <= run.appliedStep) return
  if (plan.revision <= (run.plans.get(plan.step)?.revision ?? 0)) return
  run.plans.set(plan.step, plan)
  leases.takeLeases(run, plan)
  slices.takeSlices(run, plan)
}

function takeLoad(run: WorkerRun, load: LoadState__Output): void {
  const { step, digest, sequence } = load
  leases.voidLeases(run)
  slices.voidSlices(run)
  run.plans.clear()
  run.commits.clear()
  run.sums.clear()
  run.pending = []
  run.loading = { step, sequence }
  run.appliedStep = -1
  run.effects.push({ kind: 'loadState', step, digest, sequence })
  sums.acceptSums(run)
}

function recordLoaded(run: WorkerRun, event: Extract<WorkerEvent, { kind: 'stateLoaded' }>): void {
  if (run.loading?.step !== event.step || run.loading.sequence !== event.sequence) return
  run.loading = null
  run.appliedStep = event.step
  run.appliedSequence = event.sequence
  run.weightsSha256 = event.weightsSha256
  send(run, {
    stateLoaded: { jobId: run.jobId, step: event.step, weightsSha256: event.weightsSha256 },
  })
}

function release(run: WorkerRun): void {
  const { jobId } = run
  leases.voidLeases(run)
  slices.voidSlices(run)
  const fresh = newWorkerRun(run.config)
  Object.assign(run, fresh, {
    workerId: run.workerId,
    nowMs: run.nowMs,
    effects: run.effects,
    isDraining: run.isDraining,
  })
  run.effects.push({ kind: 'releaseJob', jobId })
}

// ---- work at exactly one step ----

function doPending(run: WorkerRun): void {
  if (!isSettled(run)) return
  const due = run.pending.filter((work) => work.step <= run.appliedStep)
  for (const work of due) {
    if (work.step >= 0 && work.step < run.appliedStep) refuseWork(run, work)
    else if (!beginWork(run, work)) continue
    run.pending.splice(run.pending.indexOf(work), 1)
  }
}

/** False: no slot yet. */
function beginWork(run: WorkerRun, work: PendingWork): boolean {
  switch (work.kind) {
    case 'uploadState':
      run.effects.push({ kind: 'uploadState', step: work.step, purpose: work.purpose })
      return true
    case 'evaluate':
      run.effects.push({ kind: 'evaluate', evaluate: work.evaluate })
      return true
    case 'deliver':
      run.effects.push({ kind: 'deliver', deliver: work.deliver })
      return true
    case 'probe': {
      const slot = leases.takeSlot(run, probeName(work.step))
      if (slot === null) return false
      const { microBatch, packs, lossDivisor } = work.probe
      run.effects.push({ kind: 'probe', step: work.step, slot, microBatch, packs, lossDivisor })
      return true
    }
  }
}

const probeName = (step: number): string => `probe ${step}`

function recordProbe(run: WorkerRun, event: Extract<WorkerEvent, { kind: 'probeDone' }>): void {
  const slot = run.slots.indexOf(probeName(event.step))
  if (slot >= 0) run.slots[slot] = null
  const { step, microBatch, digest } = event
  send(run, { probeResult: { jobId: run.jobId, step, microBatch, digest } })
}

function refuseWork(run: WorkerRun, work: PendingWork): void {
  const error = {
    code: 'STATE_CONFLICT',
    message: `the weights stand at step ${run.appliedStep}, step ${work.step} was asked for`,
    details: [],
  }
  const { jobId } = run
  const { step } = work
  switch (work.kind) {
    case 'uploadState':
      return send(run, { stateUploaded: { jobId, step, purpose: work.purpose, error } })
    case 'evaluate':
      return send(run, { evaluationResult: { jobId, step, split: work.evaluate.split, error } })
    case 'probe':
      return send(run, { probeResult: { jobId, step, microBatch: work.probe.microBatch, error } })
  }
}

function report(
  run: WorkerRun,
  event: Extract<WorkerEvent, { kind: 'stateUploaded' | 'evaluated' | 'delivered' }>,
): void {
  const { jobId } = run
  if (event.kind === 'delivered') return send(run, { delivered: { ...event.delivered, jobId } })
  const { kind, ...result } = event
  if (kind === 'evaluated') return send(run, { evaluationResult: { ...result, jobId } })
  send(run, { stateUploaded: { ...result, jobId } })
}

function reportFailure(
  run: WorkerRun,
  event: Extract<WorkerEvent, { kind: 'engineFailed' }>,
): void {
  const { operation, step, error } = event
  const { jobId } = run
  if (error.code === 'DEVICE_FAILED') {
    send(run, { failure: { jobId, step, microBatch: -1, error, tensor: '' } })
    run.effects.push({ kind: 'restart', reason: `${operation}: ${error.message}` })
    return
  }
  if (operation === 'uploadState') {
    // Which of the two it was, the coordinator knows from the step.
    for (const purpose of ['checkpoint', 'snapshot']) {
      send(run, { stateUploaded: { jobId, step, purpose, error } })
    }
    return
  }
  if (operation === 'loadState') {
    run.loading = null
    return send(run, { stateLoaded: { jobId, step, weightsSha256: '', error } })
  }
  send(run, { failure: { jobId, step, microBatch: -1, error, tensor: '' } })
}

// ---- in doubt ----

/** Every sum of the next step is here and nobody has announced its commit: the log tells. */
function readLogInDoubt(run: WorkerRun): void {
  if (run.jobId === '' || !isSettled(run) || run.numSlices === 0) return
  const next = run.appliedStep + 1
  if (run.commits.has(next) || (run.sums.get(next)?.size ?? 0) < run.numSlices) return
  const lastMs = Math.max(run.lastProgressMs, run.lastCommitLogReadMs)
  if (run.nowMs - lastMs < run.config.doubtAfterMs) return
  run.lastCommitLogReadMs = run.nowMs
  run.effects.push({ kind: 'readCommitLog', afterSequence: run.appliedSequence })
}
