/**
 * Leases of a worker: computed micro-batch by micro-batch, kept in slots, sent to the slices'
 * owners.
 */
import type { Lease__Output } from '../proto/gen/tunemesh/v1/Lease.js'
import type { StepPlan__Output } from '../proto/gen/tunemesh/v1/StepPlan.js'
import type { LeaseKey, SliceKey, WorkerEvent } from './run-events.js'
import {
  type Contribution,
  isSettled,
  leaseKey,
  leaseName,
  send,
  stands,
  type WorkerRun,
} from './run-state.js'

type Event<Kind extends WorkerEvent['kind']> = Extract<WorkerEvent, { kind: Kind }>

/**
 * Takes up new leases of a plan. What the worker was leased before stands: a lease is never taken
 * back alone.
 */
export function takeLeases(run: WorkerRun, plan: StepPlan__Output): void {
  for (const lease of plan.leases) {
    if (lease.workerId !== run.workerId) continue
    const key = keyOf(plan, lease)
    if (run.contributions.has(leaseName(key))) continue
    run.contributions.set(leaseName(key), {
      ...key,
      microBatches: lease.microBatches,
      onlySlices: lease.onlySlices.length > 0 ? lease.onlySlices : null,
      state: 'waiting',
      slot: -1,
      losses: [],
      computeMs: 0,
      digests: new Map(),
      sent: new Map(),
      delivered: new Map(),
      reported: '',
    })
  }
}

const keyOf = (plan: StepPlan__Output, lease: Lease__Output): LeaseKey => ({
  fleetEpoch: plan.fleetEpoch,
  step: plan.step,
  lease: lease.lease,
  leaseAttempt: lease.leaseAttempt,
})

/**
 * Starts the next micro-batch, if the weights stand where a lease needs them and a slot is free.
 */
export function computeNext(run: WorkerRun): void {
  if (run.computing || !isSettled(run)) return
  const next = [...run.contributions.values()]
    .filter((c) => c.state === 'waiting' && c.step === run.appliedStep + 1)
    .sort((a, b) => a.lease - b.lease || a.leaseAttempt - b.leaseAttempt)[0]
  if (!next) return
  const slot = takeSlot(run, leaseName(next))
  if (slot === null) return
  next.slot = slot
  next.state = 'computing'
  run.computing = next
  run.effects.push({ kind: 'clearContribution', slot })
  computeMicroBatch(run, next)
}

function computeMicroBatch(run: WorkerRun, contribution: Contribution): void {
  const plan = run.plans.get(contribution.step)
  const microBatch = contribution.microBatches[contribution.losses.length]
  const entry = plan?.microBatches.find((it) => it.microBatch === microBatch)
  if (!plan || microBatch === undefined || !entry) {
    throw new Error(`lease ${leaseName(contribution)} lists a micro-batch without its packs`)
  }
  run.effects.push({
    kind: 'computeMicroBatch',
    ...leaseKey(contribution),
    slot: contribution.slot,
    microBatch,
    packs: entry.packs,
    lossDivisor: plan.lossDivisor,
    isLast: contribution.losses.length === contribution.microBatches.length - 1,
    isChecked: entry.checked,
  })
}

/** Backward has finished all of a slice in the lease's last micro-batch: it may go to its owner. */
export function recordSlice(run: WorkerRun, event: Event<'sliceReady'>): void {
  current(run, event)?.digests.set(event.slice, event.digest)
}

export function recordMicroBatch(run: WorkerRun, event: Event<'microBatchDone'>): void {
  const contribution = current(run, event)
  if (!contribution) return
  const { microBatch, lossSum, numTargetTokens, numTokens } = event
  contribution.losses.push({ microBatch, lossSum, numTargetTokens, numTokens })
  contribution.computeMs += event.computeMs
  if (contribution.losses.length < contribution.microBatches.length) {
    // Between micro-batches a commit may be waiting; the lease is then over.
    if (run.applying === null) computeMicroBatch(run, contribution)
    return
  }
  contribution.state = 'done'
  run.computing = null
  send(run, {
    leaseDone: {
      jobId: run.jobId,
      ...leaseKey(contribution),
      losses: contribution.losses,
      digests: [...contribution.digests].map(([slice, digest]) => ({ slice, digest })),
      computeMs: contribution.computeMs,
    },
  })
}

/** A gradient that fails, or a device: the latter ends this process, void lease or not. */
export function recordFailure(run: WorkerRun, event: Event<'microBatchFailed'>): void {
  const { step, microBatch, error, tensor, isChecked: checked } = event
  const contribution = current(run, event)
  const isDevice = error.code === 'DEVICE_FAILED'
  if (contribution) {
    // Slices of it may be under way or counted: without LeaseDone the step is never committed.
    cancel(run, contribution)
    contribution.state = 'failed'
    freeSlot(run, contribution)
    run.computing = null
  } else if (!isDevice) return
  send(run, { failure: { jobId: run.jobId, step, microBatch, error, tensor, checked } })
  if (isDevice) run.effects.push({ kind: 'restart', reason: error.message ?? '' })
}

/** The lease being computed, unless the event belongs to one that is void. */
function current(run: WorkerRun, event: LeaseKey): Contribution | null {
  const { computing } = run
  if (!computing || computing.fleetEpoch !== event.fleetEpoch) return null
  return leaseName(computing) === leaseName(event) ? computing : null
}

/** Sends every slice that stands to where the plan now says it belongs. */
export function sendContributions(run: WorkerRun): void {
  for (const contribution of run.contributions.values()) {
    const plan = run.plans.get(contribution.step)
    if (!plan) continue
    for (const { slice, sliceAttempt, workerId } of plan.owners) {
      if (workerId === run.workerId || !stands(contribution, slice)) continue
      if (contribution.onlySlices && !contribution.onlySlices.includes(slice)) continue
      if (contribution.sent.get(slice) === sliceAttempt) continue
      contribution.sent.set(slice, sliceAttempt)
      run.effects.push({
        kind: 'sendContribution',
        ...leaseKey(contribution),
        slot: contribution.slot,
        slice,
        sliceAttempt,
        ownerWorkerId: workerId,
        digest: contribution.digests.get(slice) ?? '',
      })
    }
    if (contribution.state === 'done') reportDelivered(run, contribution, plan)
  }
}

export function recordDelivered(run: WorkerRun, event: Event<'contributionDelivered'>): void {
  const contribution = run.contributions.get(leaseName(event))
  if (!contribution || contribution.fleetEpoch !== event.fleetEpoch) return
  markDelivered(contribution, event)
}

export const markDelivered = (
  contribution: Contribution,
  { slice, sliceAttempt }: Pick<SliceKey, 'slice' | 'sliceAttempt'>,
): void => {
  contribution.delivered.set(slice, sliceAttempt)
}

/**
 * Once all that the plan asks for is at its owners: from then on the worker may die without loss.
 */
function reportDelivered(run: WorkerRun, contribution: Contribution, plan: StepPlan__Output): void {
  const wanted = plan.owners.filter(
    ({ slice }) => contribution.onlySlices === null || contribution.onlySlices.includes(slice),
  )
  const isAll = wanted.every(
    ({ slice, sliceAttempt }) => contribution.delivered.get(slice) === sliceAttempt,
  )
  const signature = wanted.map(({ sliceAttempt }) => sliceAttempt).join()
  if (!isAll || contribution.reported === signature) return
  contribution.reported = signature
  send(run, {
    leaseDelivered: {
      jobId: run.jobId,
      ...leaseKey(contribution),
      slices: wanted.map(({ slice, sliceAttempt }) => ({ slice, sliceAttempt })),
    },
  })
}

// ---- slots ----

/**
 * A free slot; where there is none, one whose contribution is least needed. Null: all are needed.
 */
export function takeSlot(run: WorkerRun, user: string): number | null {
  let slot = run.slots.indexOf(null)
  if (slot < 0) {
    if (!dropOne(run)) return null
    slot = run.slots.indexOf(null)
  }
  run.slots[slot] = user
  return slot
}

/**
 * Contributions of applied steps first: every sum of theirs is here. Then one that all owners have.
 */
function dropOne(run: WorkerRun): boolean {
  const kept = [...run.contributions.values()].filter((c) => c.state === 'done')
  const applied = kept.find((c) => c.step <= run.appliedStep)
  const victim = applied ?? kept.find((c) => c.reported !== '')
  if (!victim) return false
  drop(run, victim)
  if (victim !== applied) {
    send(run, {
      contributionDropped: {
        jobId: run.jobId,
        step: victim.step,
        lease: victim.lease,
        reason: `all ${run.slots.length} contribution slots are taken`,
      },
    })
  }
  return true
}

function drop(run: WorkerRun, contribution: Contribution): void {
  if (contribution.slot >= 0) cancel(run, contribution)
  contribution.state = 'dropped'
  freeSlot(run, contribution)
}

const cancel = (run: WorkerRun, contribution: Contribution): void => {
  run.effects.push({
    kind: 'cancelContribution',
    ...leaseKey(contribution),
    slot: contribution.slot,
  })
}

function freeSlot(run: WorkerRun, contribution: Contribution): void {
  if (contribution.slot >= 0) run.slots[contribution.slot] = null
  contribution.slot = -1
}

/** Every live worker has applied these steps: nobody can ask for their contributions any more. */
export function freeThrough(run: WorkerRun, step: number): void {
  for (const [name, contribution] of run.contributions) {
    if (contribution.step > step) continue
    drop(run, contribution)
    run.contributions.delete(name)
  }
}

/**
 * The step is applied: what was not finished of it is over; what was is kept until all have
 * applied.
 */
export function endLeasesOf(run: WorkerRun, step: number): void {
  for (const [name, contribution] of run.contributions) {
    if (contribution.step > step) continue
    if (contribution.state === 'done') {
      // Nobody needs to be sent it any more: this worker serves the sums themselves.
      if (contribution.reported === '') cancel(run, contribution)
      continue
    }
    drop(run, contribution)
    run.contributions.delete(name)
  }
  if (run.computing && run.computing.step <= step) run.computing = null
}

/** A raise of the fleet epoch: leases are issued anew, gradients computed again. */
export function voidLeases(run: WorkerRun): void {
  for (const contribution of run.contributions.values()) drop(run, contribution)
  run.contributions.clear()
  run.computing = null
}
