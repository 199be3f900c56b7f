/** Slices that a worker owns: contributions counted once, finished when all leases are in. */
import type { StepPlan__Output } from '../proto/gen/tunemesh/v1/StepPlan.js'
import type { WorkerEvent } from './run-events.js'
import { markDelivered } from './run-leases.js'
import {
  leaseKey,
  type OwnedSlice,
  send,
  sliceKey,
  sliceName,
  stands,
  type WorkerRun,
} from './run-state.js'

type Event<Kind extends WorkerEvent['kind']> = Extract<WorkerEvent, { kind: Kind }>

/** Brings the owned slices of a step to what its plan says. */
export function takeSlices(run: WorkerRun, plan: StepPlan__Output): void {
  for (const { slice, sliceAttempt, workerId } of plan.owners) {
    const name = sliceName({ step: plan.step, slice })
    const owned = run.ownedSlices.get(name)
    if (owned && (workerId !== run.workerId || owned.sliceAttempt !== sliceAttempt)) {
      closeSlice(run, owned)
    }
    if (workerId !== run.workerId || run.ownedSlices.has(name)) continue
    run.ownedSlices.set(name, {
      fleetEpoch: plan.fleetEpoch,
      step: plan.step,
      slice,
      sliceAttempt,
      state: 'waiting',
      counted: new Map(),
      lastContributionMs: 0,
    })
  }
}

/**
 * Opens what may be opened (a slice has one accumulator, and the step's sum slot must be free),
 * adds this worker's own contributions, and finishes what is complete.
 */
export function advanceSlices(run: WorkerRun): void {
  for (const owned of run.ownedSlices.values()) {
    if (owned.state === 'waiting' && mayOpen(run, owned)) {
      owned.state = 'open'
      run.effects.push({ kind: 'openSlice', ...sliceKey(owned) })
    }
    if (owned.state === 'waiting') continue
    countOwn(run, owned)
    if (owned.state === 'open') finishWhenComplete(run, owned)
  }
}

/**
 * Of the step under way only: a slice of the step before may still move here after its owner's
 * death, and would take the accumulator of what was opened ahead of it. Offers wait meanwhile.
 */
const mayOpen = (run: WorkerRun, owned: OwnedSlice): boolean =>
  run.applying === null && owned.step === run.appliedStep + 1

/** From this worker's own slots, without the wire; what a sum counts already is delivered, too. */
function countOwn(run: WorkerRun, owned: OwnedSlice): void {
  for (const contribution of run.contributions.values()) {
    if (contribution.step !== owned.step || !stands(contribution, owned.slice)) continue
    if (contribution.onlySlices && !contribution.onlySlices.includes(owned.slice)) continue
    if (contribution.delivered.get(owned.slice) === owned.sliceAttempt) continue
    markDelivered(contribution, owned)
    if (owned.counted.has(contribution.lease)) continue
    owned.counted.set(contribution.lease, contribution.leaseAttempt)
    run.effects.push({
      kind: 'countContribution',
      ...leaseKey(contribution),
      slice: owned.slice,
      sliceAttempt: owned.sliceAttempt,
      slot: contribution.slot,
    })
  }
}

/** A lease counts once for a slice, from the attempt that was complete first. */
export function recordArrival(run: WorkerRun, event: Event<'contributionArrived'>): void {
  const owned = run.ownedSlices.get(sliceName(event))
  const contribution = {
    ...leaseKey(event),
    slice: event.slice,
    sliceAttempt: event.sliceAttempt,
  }
  const isWanted =
    owned?.state === 'open' &&
    owned.fleetEpoch === event.fleetEpoch &&
    owned.sliceAttempt === event.sliceAttempt &&
    !owned.counted.has(event.lease)
  if (!isWanted) {
    run.effects.push({ kind: 'dropContribution', ...contribution })
    return
  }
  owned.counted.set(event.lease, event.leaseAttempt)
  owned.lastContributionMs = run.nowMs
  run.effects.push({ kind: 'countContribution', ...contribution, slot: null })
}

function finishWhenComplete(run: WorkerRun, owned: OwnedSlice): void {
  const plan = run.plans.get(owned.step)
  if (!plan?.leases.every(({ lease }) => owned.counted.has(lease))) return
  if (holdsCommitted(run, owned)) return
  owned.state = 'finishing'
  run.effects.push({ kind: 'finishSlice', ...sliceKey(owned) })
}

/**
 * The committed sum lies in the slot, and is read or about to be. Another one, of contributions
 * that were computed again on another device class or in free mode, would have other bits.
 */
function holdsCommitted(run: WorkerRun, { step, slice }: OwnedSlice): boolean {
  const commit = run.applying?.step === step ? run.applying : run.commits.get(step)
  return commit !== undefined && run.sums.get(step)?.get(slice) === commit.digests[slice]
}

/** The sum stands in its slot: published, reported. An owner's report is enough to commit. */
export function recordFinished(run: WorkerRun, event: Event<'sliceFinished'>): void {
  const owned = run.ownedSlices.get(sliceName(event))
  if (owned?.state !== 'finishing' || owned.fleetEpoch !== event.fleetEpoch) return
  if (owned.sliceAttempt !== event.sliceAttempt) return
  owned.state = 'done'
  // One worker alone sends nothing over the wire.
  if (run.workerIds.length > 1) run.effects.push({ kind: 'publishSum', ...sliceKey(owned) })
  send(run, {
    sliceDone: {
      jobId: run.jobId,
      ...sliceKey(owned),
      sumDigest: event.sumDigest,
      publishedDigest: event.publishedDigest,
      sumSquares: event.sumSquares,
      counted: [...owned.counted].map(([lease, leaseAttempt]) => ({ lease, leaseAttempt })),
      lastContributionMs: owned.lastContributionMs,
    },
  })
}

export function closeSlicesThrough(run: WorkerRun, step: number): void {
  for (const owned of [...run.ownedSlices.values()]) {
    if (owned.step <= step) closeSlice(run, owned)
  }
}

export function voidSlices(run: WorkerRun): void {
  for (const owned of [...run.ownedSlices.values()]) closeSlice(run, owned)
}

function closeSlice(run: WorkerRun, owned: OwnedSlice): void {
  run.ownedSlices.delete(sliceName(owned))
  if (owned.state !== 'waiting') run.effects.push({ kind: 'closeSlice', ...sliceKey(owned) })
}
