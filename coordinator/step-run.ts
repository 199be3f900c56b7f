/**
 * One step under way: its leases, its slices, what is done and delivered, what a death costs.
 * Also a committed step that no worker has applied yet, and a step that is computed again after a
 * restart: then `committed` says what the results must be.
 */
import type { CommitRecord } from '../proto/commit-record.js'
import type { LeaseDone__Output } from '../proto/gen/tunemesh/v1/LeaseDone.js'
import type { MicroBatchLoss__Output } from '../proto/gen/tunemesh/v1/MicroBatchLoss.js'
import type { SliceDone__Output } from '../proto/gen/tunemesh/v1/SliceDone.js'
import { leastLoaded, type PlannedLease } from './lease-plan.js'
import { addDigests } from './update-numbers.js'

export interface StepRun {
  step: number
  fleetEpoch: number
  revision: number
  lossDivisor: number
  /** The same work on the same device class gives the same bits. */
  isDeterministic: boolean
  leases: LeaseRun[]
  slices: SliceRun[]
  /** In the log already: replay, or announced and not yet applied by all. */
  committed: { sequence: number; record: CommitRecord } | null
  isAppending: boolean
  plannedAtMs: number
  /** When its contributions could first be computed: the commit of the step before. */
  startedAtMs: number
  lastLeaseDoneMs: number
  /** Last time anything moved: what a stall is measured from. */
  progressMs: number
}

interface LeaseRun {
  lease: number
  microBatches: number[]
  /** Only workers of this device class may compute it (replay); empty: any. */
  deviceClass: string
  attempts: LeaseAttemptRun[]
  losses: MicroBatchLoss__Output[] | null
}

export interface LeaseAttemptRun {
  leaseAttempt: number
  workerId: string
  deviceClass: string
  /** null: all. */
  onlySlices: number[] | null
  isDone: boolean
  /** The worker lives and has not dropped the contribution. */
  isHeld: boolean
  digests: Map<number, string>
  /** Slice → the slice attempt at which its owner has it complete. */
  delivered: Map<number, number>
}

export interface SliceRun {
  slice: number
  sliceAttempt: number
  workerId: string
  done: SliceDone__Output | null
  numDivergences: number
}

export interface LiveWorker {
  workerId: string
  deviceClass: string
}

export interface NewStep {
  step: number
  fleetEpoch: number
  lossDivisor: number
  isDeterministic: boolean
  leases: (PlannedLease & { deviceClass: string })[]
  owners: string[]
  committed: StepRun['committed']
  nowMs: number
}

export function newStepRun(plan: NewStep, classOf: (workerId: string) => string): StepRun {
  return {
    step: plan.step,
    fleetEpoch: plan.fleetEpoch,
    revision: 1,
    lossDivisor: plan.lossDivisor,
    isDeterministic: plan.isDeterministic,
    leases: plan.leases.map(({ workerId, microBatches, deviceClass }, lease) => ({
      lease,
      microBatches,
      deviceClass,
      attempts: [newAttempt({ leaseAttempt: 1, workerId, onlySlices: null }, classOf)],
      losses: null,
    })),
    slices: plan.owners.map((workerId, slice) => ({
      slice,
      sliceAttempt: 1,
      workerId,
      done: null,
      numDivergences: 0,
    })),
    committed: plan.committed,
    isAppending: false,
    plannedAtMs: plan.nowMs,
    startedAtMs: plan.nowMs,
    lastLeaseDoneMs: plan.nowMs,
    progressMs: plan.nowMs,
  }
}

/** False: stale or unknown, nothing was changed. */
export function recordLeaseDone(
  run: StepRun,
  workerId: string,
  message: LeaseDone__Output,
): boolean {
  const lease = run.leases[message.lease]
  const attempt = lease?.attempts.find(
    (a) => a.leaseAttempt === message.leaseAttempt && a.workerId === workerId,
  )
  if (!lease || !attempt || attempt.isDone) return false
  attempt.isDone = true
  for (const { slice, digest } of message.digests) attempt.digests.set(slice, digest)
  lease.losses ??= message.losses
  return true
}

export function recordSliceDone(
  run: StepRun,
  workerId: string,
  message: SliceDone__Output,
): boolean {
  const slice = run.slices[message.slice]
  if (!slice || slice.done || slice.workerId !== workerId) return false
  if (slice.sliceAttempt !== message.sliceAttempt) return false
  slice.done = message
  return true
}

export function attemptOf(
  run: StepRun,
  key: { lease: number; leaseAttempt: number },
): LeaseAttemptRun | undefined {
  return run.leases[key.lease]?.attempts.find((a) => a.leaseAttempt === key.leaseAttempt)
}

/** Contributions that went with their worker. */
export function markLost(run: StepRun, workerId: string): void {
  for (const lease of run.leases) {
    for (const attempt of lease.attempts) {
      if (attempt.workerId === workerId) attempt.isHeld = false
    }
  }
}

export const isComplete = (run: StepRun): boolean =>
  run.slices.every((slice) => slice.done) && run.leases.every((lease) => lease.losses)

/**
 * Gives every slice a live owner and every missing contribution a live worker. Changes nothing
 * where nothing is missing. Answers whether the plan has changed; null: no live worker of a device
 * class that a lease needs, or in free mode a lease of a committed step, which nobody can repeat.
 */
export function repair(run: StepRun, live: readonly LiveWorker[]): boolean | null {
  let changed = moveOrphanedSlices(run, live)
  for (const lease of run.leases) {
    const missing = missingSlices(run, lease, live)
    if (missing.length === 0 && (lease.losses || openAttempts(lease, live).length > 0)) continue
    const able = live.filter((w) => lease.deviceClass === '' || w.deviceClass === lease.deviceClass)
    if (able.length === 0 || (run.committed && !run.isDeterministic)) return null
    const workerId = leastLoaded(
      able.map((w) => w.workerId),
      (id) => openLoad(run, id, live),
    )
    const isWhole = missing.length === 0 || missing.length === run.slices.length
    lease.attempts.push(
      newAttempt(
        {
          leaseAttempt: (lease.attempts.at(-1)?.leaseAttempt ?? 0) + 1,
          workerId,
          onlySlices: isWhole ? null : missing,
        },
        (id) => live.find((w) => w.workerId === id)?.deviceClass ?? '',
      ),
    )
    changed = true
  }
  if (changed) run.revision++
  return changed
}

/**
 * A sum that does not match its contributions is added again, by another owner where there is one.
 */
export function moveSlice(run: StepRun, slice: SliceRun, live: readonly LiveWorker[]): void {
  const others = live.filter((worker) => worker.workerId !== slice.workerId)
  const candidates = (others.length > 0 ? others : live).map((worker) => worker.workerId)
  slice.workerId = leastLoaded(candidates, (id) => ownedSlices(run, id))
  slice.sliceAttempt++
  slice.done = null
}

/**
 * Slices whose integer sum is not the sum of the contributions it claims, or which do not count
 * every lease exactly once.
 */
export const divergedSlices = (run: StepRun): SliceRun[] =>
  run.slices.filter(({ slice, done }) => {
    if (!done) return false
    const counted = new Set(done.counted.map(({ lease }) => lease))
    if (counted.size !== run.leases.length || done.counted.length !== run.leases.length) return true
    const digests = done.counted.map((key) => contributionDigest(run, key, slice))
    if (digests.some((digest) => digest === null)) return true
    return addDigests(digests as string[]) !== done.sumDigest
  })

/**
 * The sum counts an attempt that went with its worker before LeaseDone, and no other attempt on its
 * device class can stand in for it: nobody can say whether the sum is right.
 */
export const isUnprovable = (run: StepRun, { slice, done }: SliceRun): boolean =>
  done?.counted.some((key) => contributionDigest(run, key, slice) === null) ?? false

/** A slice travels ahead of its LeaseDone, which a live worker still owes. */
export const owesLeaseDone = (
  run: StepRun,
  live: readonly LiveWorker[],
): LeaseAttemptRun | undefined =>
  run.slices
    .flatMap(({ slice, done }) => (done?.counted ?? []).map((key) => ({ slice, key })))
    .filter(({ slice, key }) => contributionDigest(run, key, slice) === null)
    .map(({ key }) => attemptOf(run, key))
    .find((a) => a && !a.isDone && a.isHeld && live.some((w) => w.workerId === a.workerId))

/**
 * From now on a lease may only be computed where it was: other device classes give other bits. In
 * free mode only what all slices counted may still be added.
 */
export function markCommitted(run: StepRun, committed: NonNullable<StepRun['committed']>): void {
  run.committed = committed
  for (const { lease, deviceClass } of committed.record.leases) {
    const leaseRun = run.leases[lease]
    if (!leaseRun) continue
    leaseRun.deviceClass = deviceClass
    for (const attempt of leaseRun.attempts) {
      if (attempt.deviceClass !== deviceClass) attempt.isHeld = false
      if (!run.isDeterministic && !countedByAll(run, lease, attempt)) attempt.isHeld = false
    }
  }
}

const countedByAll = (run: StepRun, lease: number, { leaseAttempt }: LeaseAttemptRun): boolean =>
  run.slices.every(({ done }) =>
    done?.counted.some((key) => key.lease === lease && key.leaseAttempt === leaseAttempt),
  )

/** More than one device class has taken part. */
export const isMixed = (run: StepRun): boolean =>
  new Set(run.leases.flatMap((lease) => lease.attempts.map((a) => a.deviceClass))).size > 1

/** A slice of a committed step that came out different when computed again. */
export function replayDivergence(run: StepRun, message: SliceDone__Output): string | null {
  const expected = run.committed?.record.slices[message.slice]
  if (!expected) return null
  if (expected.publishedDigest === message.publishedDigest) return null
  const sums = `sum ${message.publishedDigest}, committed ${expected.publishedDigest}`
  return `step ${run.step} slice ${message.slice}: ${sums}`
}

// ---- what is missing ----

function moveOrphanedSlices(run: StepRun, live: readonly LiveWorker[]): boolean {
  let changed = false
  for (const slice of run.slices) {
    if (live.some((worker) => worker.workerId === slice.workerId)) continue
    moveSlice(run, slice, live)
    changed = true
  }
  return changed
}

/**
 * Slices for which no live worker holds or computes this lease and whose owner does not have it.
 */
function missingSlices(run: StepRun, lease: LeaseRun, live: readonly LiveWorker[]): number[] {
  const sources = lease.attempts.filter(
    (attempt) => attempt.isHeld && live.some((worker) => worker.workerId === attempt.workerId),
  )
  return run.slices
    .filter(({ slice, sliceAttempt, done }) => {
      if (done) return false
      if (lease.attempts.some((a) => a.delivered.get(slice) === sliceAttempt)) return false
      return !sources.some((a) => a.onlySlices === null || a.onlySlices.includes(slice))
    })
    .map(({ slice }) => slice)
}

const openAttempts = (lease: LeaseRun, live: readonly LiveWorker[]): LeaseAttemptRun[] =>
  lease.attempts.filter(
    (a) => !a.isDone && a.isHeld && live.some((worker) => worker.workerId === a.workerId),
  )

const openLoad = (run: StepRun, workerId: string, live: readonly LiveWorker[]): number =>
  run.leases.reduce(
    (sum, lease) =>
      sum +
      (openAttempts(lease, live).some((a) => a.workerId === workerId)
        ? lease.microBatches.length
        : 0),
    0,
  )

const ownedSlices = (run: StepRun, workerId: string): number =>
  run.slices.filter((slice) => slice.workerId === workerId).length

/**
 * The digest that a lease's contribution to a slice has. Where the counted attempt's worker died
 * before it could report, another attempt on the same device class has the same bits, but in free
 * mode.
 */
function contributionDigest(
  run: StepRun,
  key: { lease: number; leaseAttempt: number },
  slice: number,
): string | null {
  const counted = attemptOf(run, key)
  if (!counted) return null
  const known = counted.digests.get(slice)
  if (known) return known
  if (!run.isDeterministic) return null
  const twin = run.leases[key.lease]?.attempts.find(
    (a) => a.deviceClass === counted.deviceClass && a.digests.has(slice),
  )
  return twin?.digests.get(slice) ?? null
}

const newAttempt = (
  attempt: Pick<LeaseAttemptRun, 'leaseAttempt' | 'workerId' | 'onlySlices'>,
  classOf: (workerId: string) => string,
): LeaseAttemptRun => ({
  ...attempt,
  deviceClass: classOf(attempt.workerId),
  isDone: false,
  isHeld: true,
  digests: new Map(),
  delivered: new Map(),
})
