/**
 * Who takes part in a run: attaching, deaths, changes between steps. PROTOCOL.md §6, §7.
 */
import type { Prepared__Output } from '../proto/gen/tunemesh/v1/Prepared.js'
import type { AttachedWorker } from './run-events.js'
import { holdsMore, prepare, regather, reportFleet } from './run-formation.js'
import { givenUpReason, noteDeath } from './run-history.js'
import {
  type FleetWorker,
  isMember,
  log,
  members,
  numSlicesOf,
  type Run,
  send,
} from './run-state.js'
import { markLost } from './step-run.js'

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
    appliedAhead: [],
    isDraining: false,
    loadingStep: null,
    speed: 0,
    tokensPerSecond: 0,
    numBlocks: 0,
    planHash: '',
    probe: null,
    progressBytes: 0,
  }
  run.workers.set(worker.workerId, worker)
  const { precision } = run.config
  if (precision !== 'fp32' && !worker.precisions.includes(precision)) {
    return refuse(run, worker, {
      level: 'warn',
      reason: `the job computes in ${precision}, which its device "${worker.device}" can not`,
    })
  }
  const givenUp = givenUpReason(run, worker)
  if (givenUp !== null) return refuse(run, worker, { level: 'error', reason: givenUp })
  if (run.phase !== 'opening') prepare(run, worker)
}

/** It takes no part in this job, is told why, and stays for others. */
export function refuse(
  run: Run,
  worker: FleetWorker,
  { level, reason }: { level: 'warn' | 'error'; reason: string },
): void {
  worker.status = 'refused'
  worker.stage = null
  const message = `worker ${worker.workerId} on ${worker.host} is left idle: ${reason}`
  log(run, level, message)
  run.effects.push({ kind: 'event', event: { log: { level, message } } })
  send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId, reason } })
}

export function recordPrepared(run: Run, worker: FleetWorker, prepared: Prepared__Output): void {
  if (worker.status !== 'preparing') return
  worker.planHash = prepared.planHash
  worker.numBlocks = prepared.numBlocks
  worker.deviceClass = prepared.deviceClass || worker.deviceClass
  const expected = run.log.planHash || firstPlanHash(run)
  if (expected !== '' && prepared.planHash !== expected) {
    return refuse(run, worker, {
      level: 'error',
      reason:
        `PLAN_MISMATCH its plan is ${prepared.planHash}, the job's ${expected}. ` +
        'Use the same tunemesh version and model on every machine.',
    })
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

export function dropSnapshot(run: Run): void {
  const step = run.snapshot?.step
  run.snapshot = null
  for (const worker of run.workers.values()) {
    if (worker.stage === 'snapshot' && worker.loadingStep === step) worker.loadingStep = null
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
    if (isAtWork(run, worker.workerId) || isAwaited(run, worker)) continue
    send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
    send(run, worker.workerId, { shutdown: { reason: 'drained' } })
    run.workers.delete(worker.workerId)
  }
}

/** While a fleet is gathered, a draining worker may be the only one that holds the last steps. */
const isAwaited = (run: Run, worker: FleetWorker): boolean =>
  run.phase === 'gathering' && (worker.status === 'preparing' || holdsMore(run, worker))

/** Uploads a state, evaluates or delivers: it ends that first. */
const isAtWork = (run: Run, workerId: string): boolean =>
  (run.checkpoint?.stage === 'uploading' && run.checkpoint.workerId === workerId) ||
  run.snapshot?.donorId === workerId ||
  run.evaluation?.workerId === workerId ||
  run.delivery?.workerId === workerId
