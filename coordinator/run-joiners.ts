/**
 * How a worker that comes later is brought in: state, the commits since, a probe. PROTOCOL.md §7.
 */
import { isErrorCode } from '../proto/errors.js'
import type { ProbeResult__Output } from '../proto/gen/tunemesh/v1/ProbeResult.js'
import type { StateLoaded__Output } from '../proto/gen/tunemesh/v1/StateLoaded.js'
import type { StateUploaded__Output } from '../proto/gen/tunemesh/v1/StateUploaded.js'
import { tryAgain } from './run-failures.js'
import { holdsTrueState, isNear, sendEpoch, sendLoad } from './run-formation.js'
import { isBackingOff } from './run-history.js'
import { dropSnapshot, refuse } from './run-membership.js'
import { type FleetWorker, log, members, type Run, send } from './run-state.js'
import { lossDivisor, sendCommit } from './run-steps.js'

/** Workers that are ready begin to follow the fleet, or wait for a snapshot. */
export function admitJoiners(run: Run): void {
  for (const worker of run.workers.values()) {
    if (worker.status !== 'ready' || worker.isDraining) continue
    if (isBackingOff(run, worker)) continue
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
    if (worker.status !== 'joining') continue
    const isThere = worker.appliedStep === step && holdsTrueState(run, worker)
    if (worker.stage === 'following' && isThere) requestProbe(run, worker, step)
    // Asked for a probe before the others left: sums that it lacks come no more.
    const isBehind = ['following', 'probing'].includes(worker.stage ?? '') && !isThere
    if (!isBehind) continue
    worker.stage = 'snapshot'
    worker.probe = null
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
  const donors = members(run).filter((member) => member.loadingStep === null)
  // One that drains may be the last: then it gives its state before it goes.
  const donor = donors.find((member) => !member.isDraining) ?? donors[0]
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
  if (message.error) {
    const { code, message: text } = message.error
    return tryAgain(run, worker, {
      code: isErrorCode(code) ? code : 'WORKER_FAILED',
      message: `the state of step ${message.step} was not loaded: ${text}`,
    })
  }
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

/**
 * One micro-batch at the same weights on the joiner and on a member of its class: equal bits. Where
 * no member has them, the joiner's own only shows that it stands at the step and can compute.
 */
function requestProbe(run: Run, worker: FleetWorker, step: number): void {
  const { isDeterministic } = run.config
  const partner = members(run).find(
    (member) =>
      isDeterministic && member.deviceClass === worker.deviceClass && member.loadingStep === null,
  )
  worker.stageSinceMs = run.nowMs
  worker.stage = 'probing'
  const { workerId: partnerId } = partner ?? worker
  worker.probe = { step, microBatch: 0, partnerId, own: '', partner: '' }
  const probedStep = Math.min(step + 1, run.order.numSteps)
  const probe = {
    jobId: run.config.jobId,
    step,
    microBatch: 0,
    packs: run.order.microBatchPacks(probedStep, 0),
    lossDivisor: lossDivisor(run, probedStep),
  }
  send(run, worker.workerId, { probe })
  if (partner) return send(run, partnerId, { probe })
  const why = isDeterministic ? 'no member of its device class' : 'the job runs in free mode'
  log(run, 'warn', `worker ${worker.workerId} joins unproved: ${why}`)
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
    if (probe.partnerId === senderId) probe.partner = message.digest
    if (probe.own === '' || probe.partner === '') continue
    worker.probe = null
    if (probe.own === probe.partner) {
      worker.stage = 'proved'
      continue
    }
    refuse(run, worker, {
      level: 'error',
      reason:
        `PLAN_MISMATCH it computes ${probe.own} for a micro-batch at step ${probe.step}, ` +
        `worker ${probe.partnerId} of the same device class ${probe.partner}`,
    })
  }
}
