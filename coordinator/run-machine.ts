/**
 * One job's training run, as decisions only: events in, effects out; no clock, no sockets, no
 * chance. `advance` is the main path. The seeded simulation (test/simulation) runs this very code.
 * proto/PROTOCOL.md is normative; the other run-*.ts files hold the parts.
 */
import type { LoggedRecord } from '../proto/commit-record.js'
import type { Applied__Output } from '../proto/gen/tunemesh/v1/Applied.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { LeaseDone__Output } from '../proto/gen/tunemesh/v1/LeaseDone.js'
import type { SliceDone__Output } from '../proto/gen/tunemesh/v1/SliceDone.js'
import {
  beginCheckpoint,
  beginWorkAt,
  checkpointStands,
  concludeRun,
  concludeStop,
  noteCadence,
  recordDelivered,
  recordEvaluation,
  recordStored,
  recordStoreFailed,
  recordUploaded,
} from './run-checkpoint.js'
import type { RunConfig, RunEffect, RunEvent } from './run-events.js'
import { takeFailure } from './run-failures.js'
import * as formation from './run-formation.js'
import { noteContributions } from './run-history.js'
import * as joiners from './run-joiners.js'
import * as commitLog from './run-log.js'
import * as membership from './run-membership.js'
import { noteProgress, shiftWaits, watch } from './run-stall.js'
import { type FleetWorker, fail, finish, members, newRun, type Run } from './run-state.js'
import { reportSkip, reportStep } from './run-step-events.js'
import { announce, commitWhenComplete, planSteps, repairSteps, stepsAhead } from './run-steps.js'
import * as steps from './step-run.js'

export class RunMachine {
  readonly run: Run

  constructor(config: RunConfig) {
    this.run = newRun(config)
  }

  /** What the shell must do next, in this order. */
  advance(event: RunEvent, nowMs: number): RunEffect[] {
    const { run } = this
    run.nowMs = nowMs
    run.effects = []
    if (run.phase === 'ended') return []
    take(run, event)
    proceed(run)
    return run.effects
  }
}

function take(run: Run, event: RunEvent): void {
  switch (event.kind) {
    case 'started':
      return open(run, event.log)
    case 'workerAttached':
      return membership.attach(run, event.worker)
    case 'workerLost':
      return membership.lose(run, event.workerId, event.reason)
    case 'workersExhausted':
      run.exhausted = event.failure
      return
    case 'message':
      return takeMessage(run, event.workerId, event.message)
    case 'appendAcknowledged':
      return stands(run, commitLog.acknowledged(run, event.sequence))
    case 'appendRefused':
      return commitLog.refused(run)
    case 'appendUnknown':
    case 'lastRecordUnreadable':
      return commitLog.unknown(run)
    case 'lastRecordRead':
      return stands(run, commitLog.settle(run, event.last))
    case 'checkpointStored':
      return recordStored(run, event.step, event.manifestDigest)
    case 'checkpointFailed':
      return recordStoreFailed(run, event.step, event.failure)
    case 'busLost':
      run.busLostAtMs ??= run.nowMs
      return
    case 'busBack':
      run.busLostAtMs = null
      return shiftWaits(run)
    case 'stopAsked':
      return askStop(run, event.now)
    case 'resumeAsked':
      if (run.pause) run.pause.retryAtMs = run.nowMs
      return
    case 'tick':
      commitLog.tickAppends(run)
      return watch(run)
  }
}

/** The first act of any coordinator: raise the fleet epoch, which fences the one before. */
function open(run: Run, log: readonly LoggedRecord[]): void {
  if (run.phase !== 'opening') return
  run.log = commitLog.readLog(log)
  formation.raiseEpoch(run, 'coordinator', [])
}

/** Everything that may now happen, oldest step first. */
function proceed(run: Run): void {
  if (run.phase === 'gathering') {
    if (commitLog.isAppending(run, 'rollback')) return
    if (run.stopAfterStep !== null) return concludeStop(run)
    membership.releaseDrained(run)
    if (!run.appends.inFlight) formation.formFleet(run)
  }
  if (run.phase !== 'running') return
  if (!repairSteps(run) || formation.hasLostBase(run)) return formation.regather(run)
  if (!isStopping(run)) commitWhenComplete(run)
  joiners.admitJoiners(run)
  membership.releaseDrained(run)
  if (isStopping(run)) return concludeStop(run)
  const isReplaying = run.plannedThrough < run.log.committedStep
  if (run.log.committedStep >= run.order.numSteps && !isReplaying) return concludeRun(run)
  if (isBetweenSteps(run) && actBetweenSteps(run)) return
  planSteps(run, lastAllowedStep(run))
}

const isStopping = (run: Run): boolean =>
  run.stopAfterStep !== null && run.log.committedStep >= run.stopAfterStep

/** Nothing that is planned is uncommitted. */
const isBetweenSteps = (run: Run): boolean => run.plannedThrough <= run.log.committedStep

/** Changes that take effect between steps. Answers whether the next step must wait. */
function actBetweenSteps(run: Run): boolean {
  if (run.plannedThrough < run.log.committedStep) return false
  if (commitLog.isAppending(run, 'epoch')) return true
  if (run.pause) {
    if (run.nowMs >= run.pause.retryAtMs) beginCheckpoint(run, run.log.committedStep)
    return true
  }
  if (joiners.mustStandStill(run)) {
    joiners.bringInStanding(run)
    return true
  }
  if (!membership.isFleetChangeDue(run)) return false
  if (members(run).some((worker) => worker.appliedStep < run.log.committedStep)) return true
  const next = membership.nextMembers(run)
  if (next) {
    const isJoin = next.some((worker) => worker.status === 'joining')
    formation.raiseEpoch(run, isJoin ? 'join' : 'drain', next)
    return true
  }
  return drainLast(run)
}

/** The last workers drain: their state is kept first, then the run waits for others. */
function drainLast(run: Run): boolean {
  if (commitLog.checkpointStep(run.log) < run.log.committedStep) {
    beginCheckpoint(run, run.log.committedStep)
    return true
  }
  for (const worker of members(run)) worker.status = 'drained'
  formation.regather(run)
  membership.releaseDrained(run)
  return true
}

/** Beyond it no step is planned: a change is due, a pause, or a stop. */
function lastAllowedStep(run: Run): number {
  const next = run.log.committedStep + 1
  if (run.stopAfterStep !== null) return run.stopAfterStep
  if (run.pause) return run.log.committedStep
  const mustWait = membership.isFleetChangeDue(run) || joiners.mustStandStill(run)
  return mustWait ? next : run.order.numSteps
}

function askStop(run: Run, now: boolean): void {
  if (now) {
    return finish(run, {
      kind: 'stopped',
      step: run.log.committedStep,
      checkpointStep: commitLog.checkpointStep(run.log),
    })
  }
  const isUnderWay = run.plannedThrough > run.log.committedStep
  run.stopAfterStep ??= run.log.committedStep + (isUnderWay ? 1 : 0)
}

// ---- a record stands in the log ----

function stands(run: Run, logged: LoggedRecord | null): void {
  if (!logged) return
  const { record } = logged
  if (record.kind === 'epoch') {
    if (record.reason === 'coordinator') beginGathering(run)
    else formation.enterEpoch(run, record)
  } else if (record.kind === 'rollback') {
    commitLog.forgetCheckpointsAfter(run, record.toStep)
    formation.regather(run)
  } else if (record.kind === 'checkpoint') checkpointStands(run, record)
  else stepStands(run, logged)
  commitLog.sendNext(run)
}

function beginGathering(run: Run): void {
  formation.regather(run)
  for (const worker of run.workers.values()) {
    if (worker.status !== 'refused') formation.prepare(run, worker)
  }
}

/** The moment a step becomes true: announced, then followed by what is due at exactly this step. */
function stepStands(run: Run, { record }: LoggedRecord): void {
  if (record.kind !== 'commit' && record.kind !== 'skip') return
  const stepRun = run.steps.get(record.step)
  if (record.kind === 'commit') {
    reportStep(run, record)
    noteContributions(run, record)
    if (stepRun) steps.markCommitted(stepRun, { sequence: run.log.lastSequence, record })
  } else {
    reportSkip(run, record)
    run.steps.delete(record.step)
  }
  if (stepRun) {
    stepRun.isAppending = false
    stepRun.progressMs = run.nowMs
  }
  const next = run.steps.get(record.step + 1)
  if (next) {
    next.startedAtMs = run.nowMs
    next.progressMs = run.nowMs
  }
  run.lastCommitMs = run.nowMs
  run.lastApplyMs = 0
  for (const step of run.suspects.keys()) if (step <= record.step) run.suspects.delete(step)
  noteCadence(run, record.step)
  takeAppliedAhead(run, record.step)
  if (run.phase !== 'running') return
  announce(run, record.step)
  joiners.serveJoiners(run, record.step)
  beginWorkAt(run, record.step)
}

// ---- a worker's messages ----

function takeMessage(run: Run, workerId: string, message: FromWorker__Output): void {
  const worker = run.workers.get(workerId)
  if (!worker) return
  worker.lastHeardMs = run.nowMs
  if (message.prepared) membership.recordPrepared(run, worker, message.prepared)
  else if (message.leaseDone) takeLeaseDone(run, worker, message.leaseDone)
  else if (message.leaseDelivered) {
    const { lease, leaseAttempt, slices } = message.leaseDelivered
    const stepRun = openStep(run, worker, message.leaseDelivered)
    const attempt = stepRun && steps.attemptOf(stepRun, { lease, leaseAttempt })
    if (!stepRun || attempt?.workerId !== workerId) return
    for (const { slice, sliceAttempt } of slices) attempt.delivered.set(slice, sliceAttempt)
    stepRun.progressMs = run.nowMs
  } else if (message.sliceDone) takeSliceDone(run, worker, message.sliceDone)
  else if (message.applied) takeApplied(run, worker, message.applied)
  else if (message.contributionDropped) {
    const { step, lease } = message.contributionDropped
    for (const attempt of run.steps.get(step)?.leases[lease]?.attempts ?? []) {
      if (attempt.workerId === workerId) attempt.isHeld = false
    }
  } else if (message.stateUploaded) {
    if (message.stateUploaded.purpose === 'checkpoint') {
      recordUploaded(run, workerId, message.stateUploaded)
    } else joiners.recordSnapshot(run, workerId, message.stateUploaded)
  } else if (message.stateLoaded) joiners.recordLoaded(run, worker, message.stateLoaded)
  else if (message.probeResult) joiners.recordProbe(run, workerId, message.probeResult)
  else if (message.evaluationResult) recordEvaluation(run, workerId, message.evaluationResult)
  else if (message.delivered) recordDelivered(run, workerId, message.delivered)
  else if (message.drain) worker.isDraining = true
  else if (message.failure) takeFailure(run, worker, message.failure)
  else if (message.heartbeat) noteProgress(run, worker, message.heartbeat.progressBytes)
}

/** The step a member's report is about, if it is of this fleet epoch and still open. */
function openStep(
  run: Run,
  worker: FleetWorker,
  key: { fleetEpoch: number; step: number },
): steps.StepRun | null {
  if (worker.status !== 'member' || key.fleetEpoch !== run.log.fleetEpoch) return null
  return run.steps.get(key.step) ?? null
}

function takeLeaseDone(run: Run, worker: FleetWorker, message: LeaseDone__Output): void {
  const stepRun = openStep(run, worker, message)
  if (!stepRun || !steps.recordLeaseDone(stepRun, worker.workerId, message)) return
  stepRun.lastLeaseDoneMs = run.nowMs
  stepRun.progressMs = run.nowMs
  if (message.computeMs <= 0) return
  const speed = message.losses.length / message.computeMs
  const numTokens = message.losses.reduce((sum, loss) => sum + loss.numTokens, 0)
  worker.speed = worker.speed > 0 ? (worker.speed + speed) / 2 : speed
  worker.tokensPerSecond = (numTokens * 1000) / message.computeMs
}

function takeSliceDone(run: Run, worker: FleetWorker, message: SliceDone__Output): void {
  const stepRun = openStep(run, worker, message)
  if (!stepRun || !steps.recordSliceDone(stepRun, worker.workerId, message)) return
  stepRun.progressMs = run.nowMs
  const divergence = steps.replayDivergence(stepRun, message)
  if (!divergence) return
  if (steps.isMixed(stepRun) || !stepRun.isDeterministic) {
    // Contributions of several device classes: which of them counted cannot be repeated.
    formation.rollBack(run, divergence)
    formation.regather(run)
  } else {
    fail(run, {
      code: 'REPLAY_DIVERGED',
      message:
        `${divergence}. The device class is the same, the bits are not: ` +
        "check the machines' memory.",
    })
  }
}

function takeApplied(run: Run, worker: FleetWorker, message: Applied__Output): void {
  const committed = run.log.commits.get(message.step)
  const rolledBack = `it applied a step ${message.step} that was rolled back`
  if (message.step > run.log.committedStep) {
    // Its commit stood before the rollback that the log ends with.
    if (message.streamSequence <= run.log.lastSequence) {
      return membership.declareDead(run, worker.workerId, rolledBack)
    }
    if (worker.appliedAhead.length < stepsAhead) worker.appliedAhead.push(message)
    return
  }
  if (!committed || worker.loadingStep !== null || message.step <= worker.appliedStep) return
  if (message.streamSequence !== committed.sequence) {
    return membership.declareDead(run, worker.workerId, rolledBack)
  }
  worker.appliedStep = message.step
  worker.appliedSequence = committed.sequence
  worker.weightsSha256 = message.weightsSha256
  worker.stageSinceMs = run.nowMs
  run.lastApplyMs = Math.max(run.lastApplyMs, message.applyMs)
  if (committed.weightsSha256 === '') committed.weightsSha256 = message.weightsSha256
  else if (message.weightsSha256 !== '' && message.weightsSha256 !== committed.weightsSha256) {
    return fail(run, {
      code: 'DIGEST_MISMATCH',
      message:
        `after step ${message.step} worker ${worker.workerId} has weights ` +
        `${message.weightsSha256}, the others ${committed.weightsSha256}`,
    })
  }
  const stepRun = run.steps.get(message.step)
  if (stepRun) stepRun.progressMs = run.nowMs
  for (const step of run.steps.keys()) {
    const isOver = step <= run.log.committedStep && members(run).every((w) => w.appliedStep >= step)
    if (isOver) run.steps.delete(step)
  }
}

/** What workers reported of a step before it was known to stand here. */
function takeAppliedAhead(run: Run, step: number): void {
  for (const worker of run.workers.values()) {
    const known = worker.appliedAhead.filter((message) => message.step <= step)
    if (known.length === 0) continue
    worker.appliedAhead = worker.appliedAhead.filter((message) => message.step > step)
    for (const message of known) takeApplied(run, worker, message)
  }
}
