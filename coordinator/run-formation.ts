/**
 * Forming a fleet: at the start, after a restart, after the last worker died; and entering each
 * epoch, however it was raised. PROTOCOL.md §6.
 */
import type { EpochRecord } from '../proto/commit-record.js'
import { beginWorkAt } from './run-checkpoint.js'
import { isBackingOff, mustLoad } from './run-history.js'
import { append, checkpointStep, isTrueState, recordedClasses } from './run-log.js'
import { type FleetWorker, fail, log, members, type Run, send } from './run-state.js'
import { sendCommit } from './run-steps.js'

/**
 * Sums of so many committed steps are sure to lie in the slots of whoever applied them: a slot is
 * taken by the step two further, under way or void. Further behind, a snapshot helps.
 */
const maxLag = 1

/** Once enough workers are ready, or the time is over: raises the epoch with all of them. */
export function formFleet(run: Run): void {
  const candidates = candidatesOf(run)
  const waitedMs = run.nowMs - run.gatheringSinceMs
  if (candidates.length === 0) {
    const idle = [...run.workers.values()].filter((worker) => worker.status === 'refused')
    if (run.exhausted && run.workers.size === idle.length) return fail(run, run.exhausted)
    if (waitedMs > run.config.limits.noWorkersMs && run.busLostAtMs === null) {
      const others = idle.map(({ workerId }) => workerId).join(', ')
      fail(run, {
        code: 'NO_WORKERS',
        message:
          `no worker for ${Math.round(waitedMs / 1000)} s; ` +
          `${others && `${others} can not take part. Otherwise `}` +
          'start one with: tunemesh worker --join URL',
      })
    }
    return
  }
  const isWaiting = [...run.workers.values()].some((worker) => worker.status === 'preparing')
  const isEnough = candidates.length >= run.config.wantedWorkers && !isWaiting
  if (!isEnough && waitedMs < run.config.limits.gatherMs) return
  const base = baseOf(run, candidates)
  const obstacle = replayObstacle(run, base.step, candidates)
  if (obstacle !== null) return rollBack(run, obstacle)
  if (!base.isOnDevices && base.step === 0) return startAgain(run, candidates)
  raiseEpoch(run, 'formation', candidates)
}

/** Weights of a rolled-back past and no checkpoint to load: the start is made again. */
function startAgain(run: Run, workers: FleetWorker[]): void {
  for (const worker of workers) {
    forgetWork(run, worker.workerId)
    send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
    prepare(run, worker)
  }
}

/** It was asked for an evaluation, and now leaves the weights that it was asked at. */
function forgetWork(run: Run, workerId: string): void {
  if (run.evaluation?.workerId === workerId) run.evaluation = null
}

/** Those that drain only where nobody else is here: what just they hold is kept before they go. */
function candidatesOf(run: Run): FleetWorker[] {
  const all = [...run.workers.values()].filter((worker) => worker.status === 'ready')
  const staying = all.filter((worker) => !worker.isDraining)
  const ready = staying.length > 0 ? staying : all.filter((worker) => holdsMore(run, worker))
  const rested = ready.filter((worker) => !isBackingOff(run, worker))
  return rested.length > 0 ? rested : ready
}

/** Where the run can go on from: the furthest true state on a device, else the last checkpoint. */
function baseOf(run: Run, candidates: FleetWorker[]): { step: number; isOnDevices: boolean } {
  const steps = candidates.filter((worker) => holdsTrueState(run, worker)).map((w) => w.appliedStep)
  const furthest = Math.max(-1, ...steps)
  const stored = checkpointStep(run.log)
  return furthest >= stored
    ? { step: furthest, isOnDevices: true }
    : { step: stored, isOnDevices: false }
}

export const holdsTrueState = (run: Run, worker: FleetWorker): boolean =>
  worker.loadingStep === null && isTrueState(run.log, worker.appliedStep, worker.appliedSequence)

/** A true state further than the last checkpoint: without this worker it is computed again. */
export const holdsMore = (run: Run, worker: FleetWorker): boolean =>
  holdsTrueState(run, worker) && worker.appliedStep > checkpointStep(run.log)

/**
 * The fleet was formed on a state that nobody has any more: who holds the state before it waits for
 * sums that went with it, and no step of this epoch computes them.
 */
export function hasLostBase(run: Run): boolean {
  const all = members(run)
  if (all.some((worker) => worker.loadingStep !== null)) return false
  const next = 1 + Math.max(-1, ...all.map((worker) => worker.appliedStep))
  const commit = run.log.commits.get(next)
  return commit?.record.kind === 'commit' && next <= run.plannedThrough && !run.steps.has(next)
}

/**
 * Why the steps after the base can not be computed again to the same bits: free mode, or a device
 * class that one of them was computed on and that nobody has now. Null: they can.
 */
function replayObstacle(run: Run, baseStep: number, candidates: FleetWorker[]): string | null {
  const present = new Set(candidates.map((worker) => worker.deviceClass))
  for (let step = baseStep + 1; step <= run.log.committedStep; step++) {
    for (const deviceClass of recordedClasses(run.log, step)?.keys() ?? []) {
      if (!run.config.isDeterministic) {
        return 'the job runs in free mode (deterministic: false), which repeats no bits'
      }
      if (!present.has(deviceClass)) {
        return `no worker has device class ${deviceClass}, on which they were computed`
      }
    }
  }
  return null
}

/**
 * Steps since the checkpoint cannot be computed again to the same bits: they are no longer true.
 */
export function rollBack(run: Run, why: string): void {
  const toStep = checkpointStep(run.log)
  const reason = `steps ${toStep + 1} to ${run.log.committedStep} cannot be replayed: ${why}`
  const message = `rolled back to the checkpoint of step ${toStep}: ${reason}`
  log(run, 'warn', message)
  run.effects.push({ kind: 'event', event: { log: { level: 'warn', message } } })
  append(run, { kind: 'rollback', fromStep: run.log.committedStep, toStep, reason })
}

export function raiseEpoch(run: Run, reason: EpochRecord['reason'], workers: FleetWorker[]): void {
  append(
    run,
    {
      kind: 'epoch',
      step: run.log.committedStep,
      reason,
      workers: workers.map(({ workerId, deviceClass }) => ({ workerId, deviceClass })),
      planHash: workers[0]?.planHash ?? run.log.planHash,
    },
    run.log.fleetEpoch + 1,
  )
}

/** The raise stands: its workers are the members, what was under way is void. */
export function enterEpoch(run: Run, record: EpochRecord): void {
  run.steps.clear()
  for (const { workerId } of record.workers) {
    const worker = run.workers.get(workerId)
    if (!worker || !['ready', 'joining', 'member'].includes(worker.status)) continue
    worker.status = 'member'
    worker.stage = null
    worker.probe = null
  }
  for (const worker of members(run)) {
    if (!record.workers.some(({ workerId }) => workerId === worker.workerId)) {
      worker.status = 'drained'
    }
  }
  if (members(run).length === 0) return regather(run)
  const base = baseOf(run, members(run))
  // Whoever held the start went while the fleet was formed.
  if (!base.isOnDevices && base.step === 0) return regather(run)
  run.phase = 'running'
  for (const worker of run.workers.values()) {
    // Joiners that still wait for a snapshot too: they follow in this epoch once they have it.
    if (worker.status === 'member' || worker.status === 'joining') sendEpoch(run, worker)
  }
  for (const worker of members(run)) bringToBase(run, worker, base)
  run.plannedThrough = base.step
  reportFleet(run, record.reason)
  const obstacle = replayObstacle(run, base.step, members(run))
  if (obstacle === null) {
    if (base.step === 0) beginWorkAt(run, 0)
    return
  }
  // The only worker of a recorded class lags too far behind to take part.
  rollBack(run, obstacle)
  regather(run)
}

export const sendEpoch = (run: Run, worker: FleetWorker): void =>
  send(run, worker.workerId, {
    epoch: {
      jobId: run.config.jobId,
      fleetEpoch: run.log.fleetEpoch,
      step: run.log.committedStep,
      workerIds: members(run).map((member) => member.workerId),
    },
  })

/**
 * A member at the base stays, one a little behind gets the commits, any other loads the checkpoint.
 */
function bringToBase(
  run: Run,
  worker: FleetWorker,
  base: { step: number; isOnDevices: boolean },
): void {
  worker.stageSinceMs = run.nowMs
  if (base.isOnDevices && holdsTrueState(run, worker) && isNear(run, worker, base.step)) {
    for (let step = worker.appliedStep + 1; step <= base.step; step++) {
      sendCommit(run, worker.workerId, step)
    }
    return
  }
  if (base.isOnDevices) {
    // Too far behind for sums: it stays attached and joins with a snapshot.
    worker.status = 'ready'
    return
  }
  sendLoad(run, worker, {
    step: base.step,
    digest: run.log.checkpoint?.stateDigest ?? '',
    sequence: run.log.checkpoint?.commitSequence ?? 0,
  })
}

export function isNear(run: Run, worker: FleetWorker, step: number): boolean {
  if (worker.appliedStep < step - maxLag) return false
  if (worker.appliedStep < step && mustLoad(run, worker)) return false
  for (let next = worker.appliedStep + 1; next <= step; next++) {
    if (!run.log.commits.has(next)) return false
  }
  return true
}

export function sendLoad(
  run: Run,
  worker: FleetWorker,
  state: { step: number; digest: string; sequence: number },
): void {
  forgetWork(run, worker.workerId)
  worker.loadingStep = state.step
  worker.appliedStep = -1
  worker.appliedAhead = []
  worker.stageSinceMs = run.nowMs
  send(run, worker.workerId, { loadState: { jobId: run.config.jobId, ...state } })
}

/**
 * No member is left, or the replay cannot run: begin as after a restart, under this coordinator.
 */
export function regather(run: Run): void {
  run.steps.clear()
  run.phase = 'gathering'
  run.gatheringSinceMs = run.nowMs
  run.snapshot = null
  if (run.checkpoint?.stage === 'uploading') run.checkpoint = null
  for (const worker of run.workers.values()) {
    if (worker.status !== 'member' && worker.status !== 'joining') continue
    if (worker.stage === 'snapshot') worker.loadingStep = null
    worker.probe = null
    if (worker.loadingStep === null) {
      worker.status = 'ready'
      worker.stage = null
    }
  }
}

export function prepare(run: Run, worker: FleetWorker): void {
  worker.status = 'preparing'
  worker.stage = null
  worker.stageSinceMs = run.nowMs
  send(run, worker.workerId, { prepare: run.config.prepare })
}

export function reportFleet(run: Run, reason: string): void {
  run.effects.push({
    kind: 'event',
    event: {
      fleet: {
        fleetEpoch: run.log.fleetEpoch,
        reason,
        workers: [...run.workers.values()].map((worker) => ({
          workerId: worker.workerId,
          host: worker.host,
          device: worker.device,
          deviceClass: worker.deviceClass,
          state: worker.isDraining
            ? 'draining'
            : worker.status === 'refused'
              ? 'idle'
              : worker.status === 'member'
                ? 'training'
                : 'preparing',
          tokensPerSecond: worker.tokensPerSecond,
          jobId: run.config.jobId,
        })),
      },
    },
  })
}
