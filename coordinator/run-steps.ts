/** Steps of a run: planned, repaired after a death, checked, committed, announced. */

import type { CommitRecord, SkipRecord } from '../proto/commit-record.js'
import type { MicroBatchPacks } from '../proto/gen/tunemesh/v1/MicroBatchPacks.js'
import type { ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { WorkerFailure__Output } from '../proto/gen/tunemesh/v1/WorkerFailure.js'
import { planLeases, planOwners } from './lease-plan.js'
import { append, isAppending, recordedClasses } from './run-log.js'
import {
  appliedByAll,
  audience,
  type FleetWorker,
  fail,
  gateStep,
  log,
  members,
  type Run,
  send,
} from './run-state.js'
import {
  attemptOf,
  divergedSlices,
  isComplete,
  isUnprovable,
  moveSlice,
  type NewStep,
  newStepRun,
  owesLeaseDone,
  repair,
  type StepRun,
} from './step-run.js'
import { updateNumbers } from './update-numbers.js'

/** A slice whose sum differs from its contributions so often is no accident. */
const maxDivergences = 3
/** How far sums may run ahead of the slowest listener: each worker has two sum slots. */
export const stepsAhead = 2
/** So many skipped steps in a row, or all of a shorter job, are no accident of a row. */
const maxSkipsInARow = 10

/** Plans the steps that may be planned now: at most the one under way and the next. */
export function planSteps(run: Run, lastAllowedStep: number): void {
  for (;;) {
    const step = run.plannedThrough + 1
    if (step > run.order.numSteps || step > lastAllowedStep) return
    // The step after the one under way travels ahead; the one after that waits for a commit.
    if (step > run.log.committedStep + 2) return
    if (gated(run).some((worker) => gateStep(worker) < step - stepsAhead)) return
    run.plannedThrough = step
    const committed = run.log.commits.get(step)
    if (committed?.record.kind === 'skip') {
      announce(run, step)
      continue
    }
    const stepRun = newStepRun(newStep(run, step), (id) => run.workers.get(id)?.deviceClass ?? '')
    run.steps.set(step, stepRun)
    sendPlan(run, stepRun)
    // Computed again after a restart: whoever holds the sums applies at once and computes nothing.
    if (stepRun.committed) announce(run, step)
  }
}

function newStep(run: Run, step: number): NewStep {
  const workers = members(run).map(({ workerId, speed, deviceClass }) => ({
    workerId,
    speed,
    deviceClass,
  }))
  const committed = run.log.commits.get(step)
  const classes = recordedClasses(run.log, step)
  const all = Array.from({ length: run.order.numMicroBatches(step) }, (_, index) => index)
  const leases = classes
    ? [...classes].flatMap(([deviceClass, microBatches]) =>
        planLeases(
          microBatches,
          workers.filter((worker) => worker.deviceClass === deviceClass),
        ).map((lease) => ({ ...lease, deviceClass })),
      )
    : planLeases(all, workers).map((lease) => ({ ...lease, deviceClass: '' }))
  return {
    step,
    fleetEpoch: run.log.fleetEpoch,
    lossDivisor: lossDivisor(run, step),
    isDeterministic: run.config.isDeterministic,
    leases,
    owners: planOwners(
      run.numSlices,
      workers.map((worker) => worker.workerId),
    ),
    committed:
      committed?.record.kind === 'commit'
        ? { sequence: committed.sequence, record: committed.record }
        : null,
    nowMs: run.nowMs,
  }
}

/** The one divisor of the step's loss and gradient; at least 1, for a step that trains nothing. */
export function lossDivisor(run: Run, step: number): number {
  let targets = 0
  for (let index = 0; index < run.order.numMicroBatches(step); index++) {
    for (const pack of run.order.microBatchPacks(step, index)) {
      if (pack >= 0) targets += run.config.targetsPerPack[pack] ?? 0
    }
  }
  return Math.max(1, targets)
}

const gated = (run: Run): FleetWorker[] =>
  [...run.workers.values()].filter(
    (worker) =>
      worker.status === 'member' ||
      (worker.status === 'joining' && (worker.stage !== 'snapshot' || worker.loadingStep !== null)),
  )

function sendPlan(run: Run, stepRun: StepRun): void {
  const leases = stepRun.leases.flatMap((lease) =>
    lease.attempts.map((attempt) => ({
      lease: lease.lease,
      leaseAttempt: attempt.leaseAttempt,
      workerId: attempt.workerId,
      microBatches: lease.microBatches,
      onlySlices: attempt.onlySlices ?? [],
    })),
  )
  const owners = stepRun.slices.map(({ slice, sliceAttempt, workerId }) => ({
    slice,
    sliceAttempt,
    workerId,
  }))
  for (const { workerId } of members(run)) {
    const microBatches: MicroBatchPacks[] = leases
      .filter((lease) => lease.workerId === workerId)
      .flatMap((lease) => lease.microBatches)
      .map((index) => ({
        microBatch: index,
        packs: run.order.microBatchPacks(stepRun.step, index),
        checked: run.suspects.get(stepRun.step)?.has(index) ?? false,
      }))
    send(run, workerId, {
      stepPlan: {
        jobId: run.config.jobId,
        fleetEpoch: stepRun.fleetEpoch,
        step: stepRun.step,
        revision: stepRun.revision,
        leases,
        owners,
        lossDivisor: stepRun.lossDivisor,
        microBatches,
      },
    })
  }
}

/**
 * After a death or a dropped contribution. A step that some member has applied needs no repair:
 * that member has every sum. Answers false where a lease's device class is gone: the replay cannot
 * run.
 */
export function repairSteps(run: Run): boolean {
  const live = members(run)
  for (const stepRun of run.steps.values()) {
    if (stepRun.isAppending) continue
    if (live.some((worker) => worker.appliedStep >= stepRun.step)) continue
    const changed = repair(stepRun, live)
    if (changed === null) return false
    if (changed) {
      stepRun.progressMs = run.nowMs
      sendPlan(run, stepRun)
    }
  }
  return true
}

/** Appends the commit of the lowest open step once all of it is in and every sum is checked. */
export function commitWhenComplete(run: Run): void {
  const stepRun = run.steps.get(run.log.committedStep + 1)
  if (!stepRun || stepRun.isAppending || stepRun.committed || !isComplete(stepRun)) return
  if (isAppending(run, 'commit') || isAppending(run, 'skip')) return
  if (owesLeaseDone(stepRun, members(run))) return
  const diverged = divergedSlices(stepRun)
  if (diverged.length > 0) return recount(run, stepRun, diverged)
  stepRun.isAppending = true
  append(run, commitBody(run, stepRun))
}

function recount(run: Run, stepRun: StepRun, diverged: StepRun['slices']): void {
  for (const slice of diverged) {
    const isUnproved = isUnprovable(stepRun, slice)
    const what =
      `step ${stepRun.step} slice ${slice.slice}: the sum of worker ${slice.workerId} ` +
      (isUnproved
        ? 'counts a lease whose worker is gone and that no digest proves'
        : "does not match the contributions' digests")
    if (!isUnproved) slice.numDivergences++
    if (slice.numDivergences >= maxDivergences) {
      return fail(run, {
        code: 'DIGEST_MISMATCH',
        message: `${what}, ${slice.numDivergences} times; check the machines' memory`,
      })
    }
    log(run, 'warn', `${what}; it is added again`)
    moveSlice(stepRun, slice, members(run))
  }
  if (repair(stepRun, members(run)) === false) stepRun.revision++
  sendPlan(run, stepRun)
}

function commitBody(
  run: Run,
  stepRun: StepRun,
): Omit<CommitRecord, 'coordinatorId' | 'appendNumber' | 'fleetEpoch' | 'timeMs'> {
  const { config } = run
  const done = stepRun.slices.map((slice) => slice.done as NonNullable<typeof slice.done>)
  // Micro-batches in order, whoever computed them: float addition does not commute.
  const losses = stepRun.leases
    .flatMap((lease) => lease.losses ?? [])
    .sort((a, b) => a.microBatch - b.microBatch)
  return {
    kind: 'commit',
    step: stepRun.step,
    slices: stepRun.slices.map(({ slice, sliceAttempt, workerId }, index) => {
      const { sumDigest, publishedDigest, sumSquares } = done[index] as (typeof done)[number]
      return { slice, sliceAttempt, workerId, sumDigest, publishedDigest, sumSquares }
    }),
    leases: stepRun.leases.map((lease) => ({
      lease: lease.lease,
      microBatches: lease.microBatches,
      ...countedAttempt(stepRun, lease.lease),
    })),
    update: updateNumbers({
      sumSquares: done.map((slice) => slice.sumSquares),
      maxGradNorm: config.maxGradNorm,
      learningRate: config.learningRates[stepRun.step - 1] ?? 0,
      updateNumber: stepRun.step - run.log.numSkipped,
      beta1: config.beta1,
      beta2: config.beta2,
    }),
    lossSum: losses.reduce((sum, loss) => sum + loss.lossSum, 0),
    lossDivisor: stepRun.lossDivisor,
    numTargetTokens: losses.reduce((sum, loss) => sum + loss.numTargetTokens, 0),
    numTokens: losses.reduce((sum, loss) => sum + loss.numTokens, 0),
  }
}

/**
 * The attempt most slices counted; its class, or `mixed` where slices counted different classes.
 */
function countedAttempt(stepRun: StepRun, lease: number) {
  const counted = stepRun.slices.flatMap(
    (slice) => slice.done?.counted.filter((key) => key.lease === lease) ?? [],
  )
  const attempts = counted.map((key) => attemptOf(stepRun, key))
  const classes = new Set(attempts.map((attempt) => attempt?.deviceClass))
  const first = attempts[0]
  return {
    leaseAttempt: first?.leaseAttempt ?? 1,
    workerId: first?.workerId ?? '',
    deviceClass: classes.size === 1 ? (first?.deviceClass ?? '') : 'mixed',
  }
}

/** Tells everybody who is not there yet that a step is true. */
export function announce(run: Run, step: number): void {
  for (const worker of audience(run)) {
    if (gateStep(worker) < step) sendCommit(run, worker.workerId, step)
  }
}

export function sendCommit(run: Run, workerId: string, step: number): void {
  const committed = run.log.commits.get(step)
  if (committed) send(run, workerId, commitMessage(run, committed.sequence, committed.record))
}

function commitMessage(run: Run, sequence: number, record: CommitRecord | SkipRecord): ToWorker {
  const { jobId } = run.config
  const common = {
    jobId,
    fleetEpoch: run.log.fleetEpoch,
    step: record.step,
    streamSequence: sequence,
    freedThroughStep: Math.max(0, appliedByAll(run)),
  }
  if (record.kind === 'skip') return { commit: { ...common, skipped: true } }
  const slices = record.slices.map((slice) => ({
    slice: slice.slice,
    sliceAttempt: slice.sliceAttempt,
    sumDigest: slice.sumDigest,
    publishedDigest: slice.publishedDigest,
    sumSquares: slice.sumSquares,
  }))
  return { commit: { ...common, slices, update: record.update } }
}

/** A non-finite gradient where the job says skip: the log records that the step adds nothing. */
export function skipStep(run: Run, failure: WorkerFailure__Output): void {
  const stepRun = run.steps.get(failure.step)
  if (!stepRun || stepRun.isAppending || stepRun.committed) return
  const inARow = run.log.skipsInARow + 1
  if (inARow >= Math.min(maxSkipsInARow, run.order.numSteps)) {
    return fail(run, {
      code: 'NON_FINITE_GRADIENT',
      message:
        `step ${failure.step}, micro-batch ${failure.microBatch}, ${failure.tensor}: ` +
        `${failure.error?.message ?? ''} ${inARow} steps in a row had such a gradient; ` +
        `on_non_finite: skip skips at most ${inARow - 1}.`,
    })
  }
  stepRun.isAppending = true
  append(run, {
    kind: 'skip',
    step: failure.step,
    microBatch: failure.microBatch,
    tensor: failure.tensor,
    reason: failure.error?.message ?? '',
  })
}
