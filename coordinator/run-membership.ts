/**
 * Who takes part in a run: attaching, forming a fleet, deaths, joins, drains. PROTOCOL.md §6, §7.
 */
import type { EpochRecord } from '../proto/commit-record.js'
import type { Prepared__Output } from '../proto/gen/tunemesh/v1/Prepared.js'
import type { ProbeResult__Output } from '../proto/gen/tunemesh/v1/ProbeResult.js'
import type { StateLoaded__Output } from '../proto/gen/tunemesh/v1/StateLoaded.js'
import type { StateUploaded__Output } from '../proto/gen/tunemesh/v1/StateUploaded.js'
import { beginWorkAt } from './run-checkpoint.js'
import type { AttachedWorker } from './run-events.js'
import { append, checkpointStep, isTrueState, recordedClasses } from './run-log.js'
import {
  audience,
  type FleetWorker,
  fail,
  isMember,
  log,
  members,
  numSlicesOf,
  type Run,
  send,
} from './run-state.js'
import { lossDivisor, sendCommit } from './run-steps.js'
import { markLost } from './step-run.js'

/**
 * Sums of so many committed steps are sure to lie in the slots of whoever applied them: a slot is
 * taken by the step two further, under way or void. Further behind, a snapshot helps.
 */
const maxLag = 1
const maxBackoffs = 1_000

export function attach(run: Run, attached: AttachedWorker): void {
  if (run.workers.has(attached.workerId)) {
    lose(run, attached.workerId, 'its stream came back before its loss was noticed')
  }
  const worker: FleetWorker = {
    ...attached,
    status: 'preparing',
    stage: null,
    stageSinceMs: run.nowMs,
    lastHeardMs: run.nowMs,
    appliedStep: -1,
    appliedSequence: 0,
    weightsSha256: '',
    isDraining: false,
    loadingStep: null,
    speed: 0,
    tokensPerSecond: 0,
    numBlocks: 0,
    planHash: '',
    probe: null,
    numFailures: 0,
  }
  run.workers.set(worker.workerId, worker)
  if (run.phase !== 'opening') prepare(run, worker)
}

export function prepare(run: Run, worker: FleetWorker): void {
  worker.status = 'preparing'
  worker.stage = null
  worker.stageSinceMs = run.nowMs
  send(run, worker.workerId, { prepare: run.config.prepare })
}

export function recordPrepared(run: Run, worker: FleetWorker, prepared: Prepared__Output): void {
  if (worker.status !== 'preparing') return
  worker.planHash = prepared.planHash
  worker.numBlocks = prepared.numBlocks
  const expected = run.log.planHash || firstPlanHash(run)
  if (expected !== '' && prepared.planHash !== expected) {
    worker.status = 'refused'
    log(
      run,
      'error',
      `PLAN_MISMATCH worker ${worker.workerId} has plan ${prepared.planHash}, the job ${expected}. ` +
        'Use the same tunemesh version and model on every machine.',
    )
    send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
    return
  }
  run.numBlocks = prepared.numBlocks
  run.numSlices = numSlicesOf(run.config, prepared.numBlocks)
  worker.status = 'ready'
  worker.appliedStep = prepared.appliedStep
  worker.appliedSequence = prepared.appliedSequence
  worker.weightsSha256 = prepared.weightsSha256
  reportOtherClass(run, worker)
}

/** Before the log has a plan: the first worker that is ready makes it. */
function firstPlanHash(run: Run): string {
  for (const worker of run.workers.values()) {
    if (worker.planHash !== '' && ['ready', 'joining', 'member'].includes(worker.status)) {
      return worker.planHash
    }
  }
  return ''
}

function reportOtherClass(run: Run, worker: FleetWorker): void {
  const other = members(run).find((member) => member.deviceClass !== worker.deviceClass)
  if (!other) return
  log(
    run,
    'warn',
    `worker ${worker.workerId} is of device class ${worker.deviceClass}, ${other.workerId} of ` +
      `${other.deviceClass}: replicas stay identical, but the bits depend on who computed what`,
  )
}

// ---- forming a fleet: at the start, after a restart, after the last worker died ----

/** Once enough workers are ready, or the time is over: raises the epoch with all of them. */
export function formFleet(run: Run): void {
  const candidates = candidatesOf(run)
  const waitedMs = run.nowMs - run.gatheringSinceMs
  if (candidates.length === 0) {
    if (waitedMs > run.config.limits.noWorkersMs && run.busLostAtMs === null) {
      fail(run, {
        code: 'NO_WORKERS',
        message: `no worker for ${Math.round(waitedMs / 1000)} s; start one with: tunemesh worker --join URL`,
      })
    }
    return
  }
  const isWaiting = [...run.workers.values()].some((worker) => worker.status === 'preparing')
  const isEnough = candidates.length >= run.config.wantedWorkers && !isWaiting
  if (!isEnough && waitedMs < run.config.limits.gatherMs) return
  const base = baseOf(run, candidates)
  const missing = missingClass(run, base.step, candidates)
  if (missing !== null) {
    return rollBack(run, `no worker has device class ${missing}, on which they were computed`)
  }
  if (!base.isOnDevices && base.step === 0) {
    // Weights of a rolled-back past and no checkpoint to load: the start is made again.
    for (const worker of candidates) {
      send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
      prepare(run, worker)
    }
    return
  }
  raiseEpoch(run, 'formation', candidates)
}

function candidatesOf(run: Run): FleetWorker[] {
  const ready = [...run.workers.values()].filter(
    (worker) => worker.status === 'ready' && !worker.isDraining,
  )
  const rested = ready.filter((worker) => !isBackingOff(run, worker.workerId))
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

const holdsTrueState = (run: Run, worker: FleetWorker): boolean =>
  worker.loadingStep === null && isTrueState(run.log, worker.appliedStep, worker.appliedSequence)

/** A device class that a step after the base was computed on and that nobody has now. */
function missingClass(run: Run, baseStep: number, candidates: FleetWorker[]): string | null {
  const present = new Set(candidates.map((worker) => worker.deviceClass))
  for (let step = baseStep + 1; step <= run.log.committedStep; step++) {
    for (const deviceClass of recordedClasses(run.log, step)?.keys() ?? []) {
      if (!present.has(deviceClass)) return deviceClass
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
  log(run, 'warn', `rolled back to the checkpoint of step ${toStep}: ${reason}`)
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
  run.phase = 'running'
  const base = baseOf(run, members(run))
  for (const worker of audience(run)) sendEpoch(run, worker)
  for (const worker of members(run)) bringToBase(run, worker, base)
  run.plannedThrough = base.step
  reportFleet(run, record.reason)
  const missing = missingClass(run, base.step, members(run))
  if (missing === null) {
    if (base.step === 0) beginWorkAt(run, 0)
    return
  }
  // The only worker of a recorded class lags too far behind to take part.
  rollBack(run, `no member has device class ${missing}, on which they were computed`)
  regather(run)
}

const sendEpoch = (run: Run, worker: FleetWorker): void =>
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

function isNear(run: Run, worker: FleetWorker, step: number): boolean {
  if (worker.appliedStep < step - maxLag) return false
  if (worker.appliedStep < step && run.backoffs.get(worker.workerId)?.mustLoad) return false
  for (let next = worker.appliedStep + 1; next <= step; next++) {
    if (!run.log.commits.has(next)) return false
  }
  return true
}

function sendLoad(
  run: Run,
  worker: FleetWorker,
  state: { step: number; digest: string; sequence: number },
): void {
  worker.loadingStep = state.step
  worker.appliedStep = -1
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

// ---- deaths ----

/** A worker's stream is gone, or it is declared dead. */
export function lose(run: Run, workerId: string, reason: string): void {
  const worker = run.workers.get(workerId)
  if (!worker) return
  run.workers.delete(workerId)
  log(run, 'warn', `worker ${workerId} is gone: ${reason}`)
  if (run.checkpoint?.stage === 'uploading' && run.checkpoint.workerId === workerId) {
    run.checkpoint = null
    run.isCheckpointDue = true
  }
  if (run.snapshot?.donorId === workerId) dropSnapshot(run)
  if (run.evaluation?.workerId === workerId) run.evaluation = null
  if (run.delivery?.workerId === workerId) run.delivery = null
  for (const other of run.workers.values()) {
    if (other.probe?.partnerId !== workerId) continue
    other.probe = null
    if (other.stage === 'probing') other.stage = 'following'
  }
  if (worker.status !== 'member' && worker.status !== 'joining') return
  noteDeath(run, worker)
  if (worker.status !== 'member') return
  for (const stepRun of run.steps.values()) markLost(stepRun, workerId)
  if (members(run).length === 0 && run.phase === 'running') regather(run)
  reportFleet(run, `worker ${workerId} is gone: ${reason}`)
}

export function declareDead(run: Run, workerId: string, reason: string): void {
  run.effects.push({ kind: 'disconnect', workerId, reason })
  lose(run, workerId, reason)
}

function noteDeath(run: Run, worker: FleetWorker): void {
  const { firstBackoffMs, longestBackoffMs } = run.config.limits
  const deaths = (run.backoffs.get(worker.workerId)?.deaths ?? 0) + 1
  const waitMs = Math.min(longestBackoffMs, firstBackoffMs * 2 ** Math.min(deaths - 1, 30))
  const isBehind = worker.appliedStep < run.log.committedStep
  run.backoffs.delete(worker.workerId)
  run.backoffs.set(worker.workerId, { deaths, untilMs: run.nowMs + waitMs, mustLoad: isBehind })
  const oldest = run.backoffs.keys().next().value
  if (run.backoffs.size > maxBackoffs && oldest !== undefined) run.backoffs.delete(oldest)
}

const isBackingOff = (run: Run, workerId: string): boolean =>
  (run.backoffs.get(workerId)?.untilMs ?? 0) > run.nowMs

function dropSnapshot(run: Run): void {
  const step = run.snapshot?.step
  run.snapshot = null
  for (const worker of run.workers.values()) {
    if (worker.stage === 'snapshot' && worker.loadingStep === step) worker.loadingStep = null
  }
}

// ---- joins ----

/** Workers that are ready begin to follow the fleet, or wait for a snapshot. */
export function admitJoiners(run: Run): void {
  for (const worker of run.workers.values()) {
    if (worker.status !== 'ready' || worker.isDraining) continue
    if (isBackingOff(run, worker.workerId)) continue
    worker.status = 'joining'
    worker.stageSinceMs = run.nowMs
    sendEpoch(run, worker)
    if (holdsTrueState(run, worker) && isNear(run, worker, run.log.committedStep)) {
      worker.stage = 'following'
      for (let step = worker.appliedStep + 1; step <= run.log.committedStep; step++) {
        sendCommit(run, worker.workerId, step)
      }
    } else worker.stage = 'snapshot'
  }
}

/**
 * A worker alone sends no sums over the wire, so nobody can follow it: whoever joins is brought in
 * while it stands still.
 */
export const mustStandStill = (run: Run): boolean =>
  members(run).length === 1 &&
  [...run.workers.values()].some(
    (worker) => worker.status === 'joining' && worker.stage !== 'proved',
  )

/** Between steps: a joiner gets the lone member's state, then proves itself at that very step. */
export function bringInStanding(run: Run): void {
  const step = run.log.committedStep
  if (members(run).some((member) => member.appliedStep < step)) return
  for (const worker of run.workers.values()) {
    if (worker.status !== 'joining' || worker.stage !== 'following') continue
    if (worker.appliedStep === step && holdsTrueState(run, worker)) requestProbe(run, worker, step)
    else worker.stage = 'snapshot'
  }
  requestSnapshot(run, step)
}

/** Right after a commit went out: what joiners need of the members at exactly this step. */
export function serveJoiners(run: Run, step: number): void {
  if (mustStandStill(run)) return
  requestSnapshot(run, step)
  for (const worker of run.workers.values()) {
    if (worker.status !== 'joining' || worker.stage !== 'following') continue
    if (worker.appliedStep < step - 1) continue
    requestProbe(run, worker, step)
  }
}

function requestSnapshot(run: Run, step: number): void {
  if (run.snapshot) return
  const waiting = [...run.workers.values()].filter((w) => w.stage === 'snapshot')
  const donor = members(run).find((member) => member.loadingStep === null && !member.isDraining)
  if (waiting.length === 0 || !donor) return
  run.snapshot = { step, donorId: donor.workerId }
  for (const worker of waiting) {
    worker.loadingStep = step
    worker.stageSinceMs = run.nowMs
  }
  send(run, donor.workerId, {
    uploadState: { jobId: run.config.jobId, step, purpose: 'snapshot' },
  })
}

export function recordSnapshot(run: Run, donorId: string, message: StateUploaded__Output): void {
  const { snapshot } = run
  if (!snapshot || snapshot.donorId !== donorId || snapshot.step !== message.step) return
  if (message.error) {
    log(
      run,
      'warn',
      `snapshot of step ${message.step} on worker ${donorId}: ${message.error.message}`,
    )
    return dropSnapshot(run)
  }
  run.snapshot = null
  const sequence = run.log.commits.get(message.step)?.sequence ?? 0
  for (const worker of run.workers.values()) {
    if (worker.stage !== 'snapshot' || worker.loadingStep !== message.step) continue
    worker.stage = 'loading'
    sendLoad(run, worker, { step: message.step, digest: message.digest, sequence })
    for (let step = message.step + 1; step <= run.log.committedStep; step++) {
      sendCommit(run, worker.workerId, step)
    }
  }
}

export function recordLoaded(run: Run, worker: FleetWorker, message: StateLoaded__Output): void {
  if (worker.loadingStep !== message.step) return
  if (message.error) return declareDead(run, worker.workerId, message.error.message)
  worker.loadingStep = null
  worker.appliedStep = message.step
  worker.appliedSequence = run.log.commits.get(message.step)?.sequence ?? 0
  if (run.log.checkpoint?.step === message.step) {
    worker.appliedSequence = run.log.checkpoint.commitSequence
  }
  worker.weightsSha256 = message.weightsSha256
  worker.stageSinceMs = run.nowMs
  if (worker.status !== 'joining') return
  if (run.phase === 'gathering') {
    worker.status = 'ready'
    worker.stage = null
  } else worker.stage = 'following'
}

/** One micro-batch at the same weights on the joiner and on a member of its class. */
function requestProbe(run: Run, worker: FleetWorker, step: number): void {
  const partner = members(run).find(
    (member) => member.deviceClass === worker.deviceClass && member.loadingStep === null,
  )
  worker.stageSinceMs = run.nowMs
  if (!partner) {
    worker.stage = 'proved'
    log(run, 'warn', `worker ${worker.workerId} joins unproved: no member of its device class`)
    return
  }
  worker.stage = 'probing'
  worker.probe = { step, microBatch: 0, partnerId: partner.workerId, own: '', partner: '' }
  const probedStep = Math.min(step + 1, run.order.numSteps)
  const probe = {
    jobId: run.config.jobId,
    step,
    microBatch: 0,
    packs: run.order.microBatchPacks(probedStep, 0),
    lossDivisor: lossDivisor(run, probedStep),
  }
  send(run, worker.workerId, { probe })
  send(run, partner.workerId, { probe })
}

export function recordProbe(run: Run, senderId: string, message: ProbeResult__Output): void {
  for (const worker of run.workers.values()) {
    const { probe } = worker
    if (!probe || probe.step !== message.step) continue
    const isConcerned = worker.workerId === senderId || probe.partnerId === senderId
    if (message.error && isConcerned) {
      // Its weights have moved on: both are asked again right after the next commit.
      worker.probe = null
      worker.stage = 'following'
      continue
    }
    if (worker.workerId === senderId) probe.own = message.digest
    else if (probe.partnerId === senderId) probe.partner = message.digest
    if (probe.own === '' || probe.partner === '') continue
    worker.probe = null
    if (probe.own === probe.partner) {
      worker.stage = 'proved'
      continue
    }
    log(
      run,
      'error',
      `PLAN_MISMATCH worker ${worker.workerId} computes ${probe.own} for a micro-batch at step ` +
        `${probe.step}, worker ${probe.partnerId} of the same device class ${probe.partner}; refused`,
    )
    worker.status = 'refused'
    worker.stage = null
    send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
  }
}

// ---- changes between steps ----

export const isFleetChangeDue = (run: Run): boolean =>
  [...run.workers.values()].some(
    (worker) =>
      (worker.status === 'joining' && worker.stage === 'proved') ||
      (worker.status === 'member' && worker.isDraining),
  )

/** Between steps: proved joiners come in, draining members go. Null: nobody would be left. */
export function nextMembers(run: Run): FleetWorker[] | null {
  const next = [...run.workers.values()].filter(
    (worker) =>
      !worker.isDraining &&
      (worker.status === 'member' || (worker.status === 'joining' && worker.stage === 'proved')),
  )
  return next.length > 0 ? next : null
}

/** A drained worker may end once nobody needs the sums it still holds. */
export function releaseDrained(run: Run): void {
  if (members(run).some((worker) => worker.appliedStep < run.log.committedStep)) return
  for (const worker of [...run.workers.values()]) {
    if (worker.status !== 'drained' && !(worker.isDraining && !isMember(run, worker.workerId))) {
      continue
    }
    if (isAtWork(run, worker.workerId)) continue
    send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
    send(run, worker.workerId, { shutdown: { reason: 'drained' } })
    run.workers.delete(worker.workerId)
  }
}

/** Uploads a state, evaluates or delivers: it ends that first. */
const isAtWork = (run: Run, workerId: string): boolean =>
  (run.checkpoint?.stage === 'uploading' && run.checkpoint.workerId === workerId) ||
  run.snapshot?.donorId === workerId ||
  run.evaluation?.workerId === workerId ||
  run.delivery?.workerId === workerId

function reportFleet(run: Run, reason: string): void {
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
