/**
 * Sums and commits: a worker applies a step when it holds the commit and every verified sum of it.
 */
import type { CommitRecord, LoggedRecord, SkipRecord } from '../proto/commit-record.js'
import type { Commit__Output } from '../proto/gen/tunemesh/v1/Commit.js'
import type { WorkerEvent } from './run-events.js'
import { endLeasesOf, freeThrough } from './run-leases.js'
import { closeSlicesThrough } from './run-slices.js'
import { isSettled, type PendingCommit, send, sliceName, type WorkerRun } from './run-state.js'

/** Rounds of asking everybody for a missing sum before a worker gives up on it. */
const mostRounds = 10

type Event<Kind extends WorkerEvent['kind']> = Extract<WorkerEvent, { kind: Kind }>

/** Steps whose sums the two slots can take. */
export function acceptSums(run: WorkerRun): void {
  const base = run.loading?.step ?? run.appliedStep
  // While the engine reads the slot of the step that it applies, nobody may write there.
  const steps = run.applying ? [base + 2] : [base + 1, base + 2]
  const accepted = steps.join()
  if (accepted === run.acceptedSums) return
  run.acceptedSums = accepted
  run.effects.push({ kind: 'acceptSums', steps })
}

/** What now stands in a sum slot, whoever added it. The step two before lay in the same slot. */
export function recordSum(
  run: WorkerRun,
  { step, slice, digest }: { step: number; slice: number; digest: string },
): void {
  const sums = run.sums.get(step) ?? new Map<number, string>()
  sums.set(slice, digest)
  run.sums.set(step, sums)
  run.sums.get(step - 2)?.delete(slice)
  for (const held of run.sums.keys()) if (held < step - 2) run.sums.delete(held)
}

export function forgetSum(run: WorkerRun, { step, slice }: Event<'sumOverwritten'>): void {
  run.sums.get(step)?.delete(slice)
}

/** Only what stands here with the digest asked for is served. */
export function serveSum(run: WorkerRun, event: Event<'sumRequested'>): void {
  const { step, slice, digest, byWorkerId } = event
  const isHeld = run.sums.get(step)?.get(slice) === digest
  run.effects.push({ kind: isHeld ? 'sendSum' : 'refuseSum', step, slice, toWorkerId: byWorkerId })
}

export function recordCommit(run: WorkerRun, commit: Commit__Output): void {
  freeThrough(run, Math.min(commit.freedThroughStep, run.appliedStep))
  keepCommit(run, {
    step: commit.step,
    sequence: commit.streamSequence,
    isSkipped: commit.skipped,
    digests: bySlice(commit.slices),
    update: commit.update,
  })
}

/**
 * In doubt the stream tells: what stands there is committed, whether or not anybody announced it.
 */
export function recordCommitLog(run: WorkerRun, records: readonly LoggedRecord[]): void {
  for (const { record } of records) {
    // Weights of a past that was rolled back: the coordinator says what to load.
    if (record.kind === 'rollback' && record.toStep < run.appliedStep) return
  }
  for (const { sequence, record } of records) {
    if (record.kind === 'rollback') run.commits.clear()
    if (record.kind === 'commit' || record.kind === 'skip') {
      keepCommit(run, fromRecord(record, sequence))
    }
  }
}

const fromRecord = (record: CommitRecord | SkipRecord, sequence: number) => ({
  step: record.step,
  sequence,
  isSkipped: record.kind === 'skip',
  digests: record.kind === 'commit' ? bySlice(record.slices) : [],
  update: record.kind === 'commit' ? record.update : null,
})

function bySlice(slices: readonly { slice: number; publishedDigest: string }[]): string[] {
  const digests: string[] = []
  for (const { slice, publishedDigest } of slices) digests[slice] = publishedDigest
  return digests
}

function keepCommit(
  run: WorkerRun,
  commit: Omit<PendingCommit, 'sinceMs' | 'askedAtMs' | 'numAsked' | 'numRefused'>,
): void {
  const base = run.loading?.step ?? run.appliedStep
  // Sums of two steps fit; a commit further on waits in the log.
  if (commit.step <= base || commit.step > base + 2) return
  if (run.applying?.step === commit.step) return
  run.commits.set(commit.step, {
    ...commit,
    sinceMs: run.nowMs,
    askedAtMs: run.nowMs,
    numAsked: 0,
    numRefused: 0,
  })
}

/** All or nothing: the next step, once its commit and every sum are here. */
export function applyNext(run: WorkerRun): void {
  while (isSettled(run)) {
    const commit = run.commits.get(run.appliedStep + 1)
    if (!commit) return
    // Work at exactly these weights comes first.
    if (run.pending.some((work) => work.step === run.appliedStep)) return
    if (commit.isSkipped) {
      finishStep(run, commit, { weightsSha256: run.weightsSha256, applyMs: 0 })
      continue
    }
    if (missingSums(run, commit).length > 0) return
    run.applying = commit
    run.commits.delete(commit.step)
    run.effects.push({
      kind: 'applyUpdate',
      step: commit.step,
      update: {
        learningRate: commit.update?.learningRate ?? 0,
        clipFactor: commit.update?.clipFactor ?? 0,
        biasCorrection1: commit.update?.biasCorrection1 ?? 0,
        biasCorrection2Sqrt: commit.update?.biasCorrection2Sqrt ?? 0,
      },
    })
    acceptSums(run)
    return
  }
}

export function recordApplied(run: WorkerRun, event: Event<'updateApplied'>): void {
  const commit = run.applying
  if (commit?.step !== event.step) return
  run.applying = null
  finishStep(run, commit, event)
}

function finishStep(
  run: WorkerRun,
  commit: PendingCommit,
  { weightsSha256, applyMs }: { weightsSha256: string; applyMs: number },
): void {
  run.appliedStep = commit.step
  run.appliedSequence = commit.sequence
  run.weightsSha256 = weightsSha256
  run.lastProgressMs = run.nowMs
  run.commits.delete(commit.step)
  endLeasesOf(run, commit.step)
  closeSlicesThrough(run, commit.step)
  for (const step of run.plans.keys()) if (step <= commit.step) run.plans.delete(step)
  const streamSequence = commit.sequence
  send(run, {
    applied: { jobId: run.jobId, step: commit.step, weightsSha256, applyMs, streamSequence },
  })
  acceptSums(run)
}

/** Also one that this worker is just writing into the slot. */
function missingSums(run: WorkerRun, commit: PendingCommit): number[] {
  const held = run.sums.get(commit.step)
  const missing: number[] = []
  commit.digests.forEach((digest, slice) => {
    const owned = run.ownedSlices.get(sliceName({ step: commit.step, slice }))
    if (held?.get(slice) !== digest || owned?.state === 'finishing') missing.push(slice)
  })
  return missing
}

/**
 * Asked round and round, refused, and no plan to compute the step again: the sums are gone. The
 * coordinator lets this worker go and gives it a snapshot when it comes back.
 */
export function recordRefusal(run: WorkerRun, event: Event<'sumUnavailable'>): void {
  const commit = run.commits.get(event.step)
  if (!commit || event.step !== run.appliedStep + 1 || run.plans.has(event.step)) return
  commit.numRefused++
  if (commit.numAsked < mostRounds || commit.numRefused < mostRounds) return
  commit.numAsked = 0
  commit.numRefused = 0
  const message = `no worker has the sum of step ${event.step} slice ${event.slice} any more`
  send(run, {
    failure: {
      jobId: run.jobId,
      step: event.step,
      microBatch: -1,
      error: { code: 'STATE_CONFLICT', message, details: [] },
      tensor: '',
    },
  })
}

/**
 * Asks for sums that a commit names and that are not here: their owner first, then every other
 * worker in turn. All workers keep the sums of the last two steps.
 */
export function requestMissingSums(run: WorkerRun): void {
  const commit = run.commits.get(run.appliedStep + 1)
  if (!commit || commit.isSkipped || !isSettled(run)) return
  const isListener = run.workerIds.includes(run.workerId) && run.workerIds.length > 1
  const isDue = run.nowMs - commit.askedAtMs >= run.config.requestSumEveryMs
  // A joiner beside a worker that publishes nothing asks at once.
  if (!isDue && (isListener || commit.numAsked > 0)) return
  const others = run.workerIds.filter((id) => id !== run.workerId)
  const missing = missingSums(run, commit)
  if (others.length === 0 || missing.length === 0) return
  for (const slice of missing) {
    const owner = run.plans.get(commit.step)?.owners.find((entry) => entry.slice === slice)
    const isOwnerFirst = commit.numAsked === 0 && owner && owner.workerId !== run.workerId
    const fromWorkerId = isOwnerFirst
      ? owner.workerId
      : (others[(commit.numAsked + slice) % others.length] as string)
    run.effects.push({
      kind: 'requestSum',
      step: commit.step,
      slice,
      fromWorkerId,
      digest: commit.digests[slice] as string,
    })
  }
  commit.askedAtMs = run.nowMs
  commit.numAsked++
}
