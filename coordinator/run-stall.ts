/** What a run waits for, named within seconds, and given up within minutes (I8). */
import { declareDead } from './run-membership.js'
import { type FleetWorker, fail, members, type Run } from './run-state.js'
import { owesLeaseDone, type StepRun } from './step-run.js'

interface Wait {
  /** Empty: no worker's fault. */
  workerId: string
  step: number
  waitingFor: string
  sinceMs: number
}

/** Ticks further apart than this mean that this process itself stood still. */
const ownStallMs = 2_000

export function watch(run: Run): void {
  forgiveOwnStall(run)
  if (run.busLostAtMs !== null) {
    nameWait(run, {
      workerId: '',
      step: run.log.committedStep + 1,
      waitingFor: 'nats-server, which is away',
      sinceMs: run.busLostAtMs,
    })
    return
  }
  for (const worker of [...run.workers.values()]) {
    const silentMs = run.nowMs - worker.lastHeardMs
    if (silentMs > run.config.limits.deadAfterMs) {
      declareDead(run, worker.workerId, `no heartbeat for ${(silentMs / 1000).toFixed(1)} s`)
    }
  }
  const wait = waitOf(run)
  if (!wait) {
    run.namedStall = ''
    return
  }
  nameWait(run, wait)
  giveUp(run, wait)
}

/** Heartbeats that nobody could take in the meantime are not missing. */
function forgiveOwnStall(run: Run): void {
  const gapMs = run.lastTickMs === null ? 0 : run.nowMs - run.lastTickMs
  run.lastTickMs = run.nowMs
  if (gapMs > ownStallMs) shiftWaits(run)
}

export function shiftWaits(run: Run): void {
  for (const worker of run.workers.values()) {
    worker.lastHeardMs = run.nowMs
    worker.stageSinceMs = run.nowMs
  }
  for (const stepRun of run.steps.values()) stepRun.progressMs = run.nowMs
  if (run.checkpoint) run.checkpoint.sinceMs = run.nowMs
  if (run.delivery) run.delivery.sinceMs = run.nowMs
}

/** Files that move make a long stage a live one: a model over a slow line takes hours. */
export function noteProgress(run: Run, worker: FleetWorker, progressBytes: number): void {
  const grew = progressBytes > worker.progressBytes
  worker.progressBytes = progressBytes
  if (!grew) return
  if (worker.status !== 'member' || worker.loadingStep !== null) worker.stageSinceMs = run.nowMs
  if (run.checkpoint?.workerId === worker.workerId) run.checkpoint.sinceMs = run.nowMs
  if (run.delivery?.workerId === worker.workerId) run.delivery.sinceMs = run.nowMs
}

function nameWait(run: Run, wait: Wait): void {
  const ms = run.nowMs - wait.sinceMs
  const key = `${wait.workerId} ${wait.step} ${wait.waitingFor} ${wait.sinceMs}`
  // A step that always takes long has not stalled because it takes long again.
  const patienceMs = Math.max(run.config.limits.stallAfterMs, 3 * run.lastStepMs)
  if (ms < patienceMs || run.namedStall === key) return
  run.namedStall = key
  run.effects.push({
    kind: 'event',
    event: {
      stalled: {
        workerId: wait.workerId,
        step: wait.step,
        waitingFor: wait.waitingFor,
        seconds: ms / 1000,
      },
    },
  })
}

function giveUp(run: Run, wait: Wait): void {
  if (wait.workerId === '') return
  const ms = run.nowMs - wait.sinceMs
  const worker = run.workers.get(wait.workerId)
  const isJoining = worker?.status !== 'member' || worker.loadingStep !== null
  const limitMs = isJoining ? run.config.limits.joinStageMs : run.config.limits.giveUpAfterMs
  if (ms <= limitMs) return
  declareDead(
    run,
    wait.workerId,
    `${wait.waitingFor} of step ${wait.step} did not come for ${(ms / 1000).toFixed(1)} s`,
  )
}

/** The one thing that holds the run up most: the first missing message of the oldest step. */
function waitOf(run: Run): Wait | null {
  if (run.appends.inFlight) {
    const { record, sinceMs } = run.appends.inFlight
    const step = 'step' in record ? record.step : run.log.committedStep
    return {
      workerId: '',
      step,
      waitingFor: `JetStream's acknowledgement of the ${record.kind} record`,
      sinceMs,
    }
  }
  if (run.phase === 'gathering') return gatheringWait(run)
  if (run.phase !== 'running') return null
  return loadingWait(run) ?? stepWait(run) ?? catchUpWait(run) ?? sideWait(run)
}

function gatheringWait(run: Run): Wait {
  const slow = [...run.workers.values()].find((w) => w.status === 'preparing')
  return {
    workerId: slow?.workerId ?? '',
    step: run.log.committedStep + 1,
    waitingFor: slow ? 'Prepared' : 'a worker to attach',
    sinceMs: slow?.stageSinceMs ?? run.gatheringSinceMs,
  }
}

function loadingWait(run: Run): Wait | null {
  const worker = members(run).find((w) => w.loadingStep !== null)
  if (!worker) return null
  return waitFor(worker, worker.loadingStep ?? 0, 'StateLoaded', worker.stageSinceMs)
}

function stepWait(run: Run): Wait | null {
  const steps = [...run.steps.values()].sort((a, b) => a.step - b.step)
  const oldest = steps[0]
  if (!oldest) return null
  const isCommitted = oldest.step <= run.log.committedStep
  return (isCommitted ? null : resultWait(run, oldest)) ?? applyWait(run, oldest)
}

function resultWait(run: Run, stepRun: StepRun): Wait | null {
  const { step, progressMs } = stepRun
  for (const lease of stepRun.leases) {
    if (lease.losses) continue
    const workerId = lease.attempts.filter((a) => a.isHeld).at(-1)?.workerId ?? ''
    return { workerId, step, waitingFor: `LeaseDone of lease ${lease.lease}`, sinceMs: progressMs }
  }
  const open = stepRun.slices.filter((slice) => !slice.done)
  for (const { slice, sliceAttempt } of open) {
    for (const lease of stepRun.leases) {
      if (lease.attempts.some((a) => a.delivered.get(slice) === sliceAttempt)) continue
      const sender = lease.attempts
        .filter((a) => a.isHeld && (a.onlySlices === null || a.onlySlices.includes(slice)))
        .at(-1)
      const waitingFor = `LeaseDelivered of lease ${lease.lease}, slice ${slice}`
      return { workerId: sender?.workerId ?? '', step, waitingFor, sinceMs: progressMs }
    }
  }
  const owner = open[0]
  if (!owner) return owedWait(run, stepRun)
  return {
    workerId: owner.workerId,
    step,
    waitingFor: `SliceDone of slice ${owner.slice}`,
    sinceMs: progressMs,
  }
}

/** Every sum is in; one counts a lease that is computed a second time and not reported yet. */
function owedWait(run: Run, stepRun: StepRun): Wait | null {
  const owed = owesLeaseDone(stepRun, members(run))
  if (!owed) return null
  const { step, progressMs } = stepRun
  return { workerId: owed.workerId, step, waitingFor: 'LeaseDone', sinceMs: progressMs }
}

function applyWait(run: Run, stepRun: StepRun): Wait | null {
  const slow = [...run.workers.values()].find(
    (worker) =>
      (worker.status === 'member' ||
        (worker.status === 'joining' && worker.stage !== 'snapshot' && worker.stage !== null)) &&
      worker.appliedStep < stepRun.step,
  )
  return slow ? waitFor(slow, stepRun.step, 'Applied', stepRun.progressMs) : null
}

/** A member behind the last commit of steps that are no longer open. */
function catchUpWait(run: Run): Wait | null {
  const slow = members(run).find((worker) => worker.appliedStep < run.plannedThrough)
  return slow ? waitFor(slow, slow.appliedStep + 1, 'Applied', slow.stageSinceMs) : null
}

function sideWait(run: Run): Wait | null {
  if (run.checkpoint?.stage === 'uploading') {
    const { workerId, step, sinceMs } = run.checkpoint
    return { workerId, step, waitingFor: 'StateUploaded', sinceMs }
  }
  if (run.delivery) {
    const { workerId, sinceMs } = run.delivery
    return { workerId, step: run.log.committedStep, waitingFor: 'Delivered', sinceMs }
  }
  const joiner = [...run.workers.values()].find((w) => w.status === 'joining')
  if (!joiner) return null
  return waitFor(joiner, run.log.committedStep, `its ${joiner.stage} to end`, joiner.stageSinceMs)
}

const waitFor = (worker: FleetWorker, step: number, waitingFor: string, sinceMs: number): Wait => ({
  workerId: worker.workerId,
  step,
  waitingFor,
  sinceMs,
})

/**
 * A worker that cannot prepare at all, with nobody else there: the job's fault, not the fleet's.
 */
export function failWhereNobodyCan(
  run: Run,
  code: Parameters<typeof fail>[1]['code'],
  message: string,
): void {
  const others = [...run.workers.values()].filter((w) => w.status !== 'refused')
  if (others.length === 0) fail(run, { code, message })
}
