/**
 * The commit log in the run machine: what stands in it, and appending to it. One append is out at a
 * time; an append whose fate is unknown is settled by reading the last record (PROTOCOL.md §3).
 */
import type { CommitLogRecord, LoggedRecord } from '../proto/commit-record.js'
import { emptyLog, finish, type LogView, log, type Run } from './run-state.js'

/** Everything about the record but who appends it, which append it is, and when. */
export type RecordBody = CommitLogRecord extends infer R
  ? R extends CommitLogRecord
    ? Omit<R, 'coordinatorId' | 'appendNumber' | 'fleetEpoch' | 'timeMs'>
    : never
  : never

export function append(run: Run, body: RecordBody, fleetEpoch = run.log.fleetEpoch): void {
  const record = {
    ...body,
    coordinatorId: run.config.coordinatorId,
    appendNumber: run.appends.nextNumber++,
    fleetEpoch,
    timeMs: run.nowMs,
  } as CommitLogRecord
  run.appends.queue.push(record)
  sendNext(run)
}

export const isAppending = (run: Run, kind: CommitLogRecord['kind']): boolean =>
  run.appends.inFlight?.record.kind === kind ||
  run.appends.queue.some((record) => record.kind === kind)

/** Answers the record that now stands, or null where the event answers no append of ours. */
export function acknowledged(run: Run, sequence: number): LoggedRecord | null {
  const { inFlight } = run.appends
  if (!inFlight) return null
  run.appends.inFlight = null
  const logged = { sequence, record: inFlight.record }
  applyRecord(run.log, logged)
  return logged
}

export function sendNext(run: Run): void {
  if (run.appends.inFlight) return
  const record = run.appends.queue.shift()
  if (!record) return
  // A checkpoint may have come between the decision and this append.
  if (record.kind === 'rollback') record.toStep = checkpointStep(run.log)
  run.appends.inFlight = { record, sinceMs: run.nowMs, readAtMs: null }
  run.effects.push({ kind: 'append', record, expectedLastSequence: run.log.lastSequence })
}

/** Checkpoints of steps that are no longer true are not recorded. */
export function forgetCheckpointsAfter(run: Run, step: number): void {
  run.appends.queue = run.appends.queue.filter(
    (record) => record.kind !== 'checkpoint' || record.step <= step,
  )
  if (run.checkpoint && run.checkpoint.step > step) run.checkpoint = null
}

/** Refused: either an earlier try of ours stands, or somebody else's record. The log tells. */
export function refused(run: Run): void {
  if (!run.appends.inFlight) return
  run.appends.inFlight.readAtMs = null
  run.effects.push({ kind: 'readLastRecord' })
}

/** Unknown: wait a little, then look. */
export function unknown(run: Run): void {
  const { inFlight } = run.appends
  if (inFlight) inFlight.readAtMs = run.nowMs + run.config.limits.appendRetryMs
}

export function tickAppends(run: Run): void {
  const { inFlight } = run.appends
  if (!inFlight || inFlight.readAtMs === null || run.nowMs < inFlight.readAtMs) return
  inFlight.readAtMs = null
  run.effects.push({ kind: 'readLastRecord' })
}

/**
 * What the last record says about the append that is out: it stands (its logged form is answered),
 * it does not stand yet (sent again under the same condition, so that at most one of the tries
 * counts), or another coordinator's record stands, which fences this one.
 */
export function settle(run: Run, last: LoggedRecord | null): LoggedRecord | null {
  const { inFlight } = run.appends
  if (!inFlight) return null
  const isOurs =
    last?.record.coordinatorId === inFlight.record.coordinatorId &&
    last.record.appendNumber === inFlight.record.appendNumber
  if (last && isOurs) return acknowledged(run, last.sequence)
  if ((last?.sequence ?? 0) === run.log.lastSequence) {
    run.effects.push({
      kind: 'append',
      record: inFlight.record,
      expectedLastSequence: run.log.lastSequence,
    })
    return null
  }
  if (run.phase === 'opening') {
    run.appends.inFlight = null
    run.effects.push({ kind: 'readLog' })
    return null
  }
  const by = last?.record.coordinatorId ?? 'nobody: the log is empty'
  log(run, 'error', `coordinator ${by} has taken over job ${run.config.jobId}; this one stops`)
  finish(run, { kind: 'fenced', byCoordinatorId: by })
  return null
}

// ---- what the log says ----

export function readLog(records: readonly LoggedRecord[]): LogView {
  const view = emptyLog()
  for (const logged of records) applyRecord(view, logged)
  return view
}

function applyRecord(view: LogView, { sequence, record }: LoggedRecord): void {
  view.lastSequence = sequence
  view.fleetEpoch = Math.max(view.fleetEpoch, record.fleetEpoch)
  switch (record.kind) {
    case 'epoch':
      if (record.planHash) view.planHash = record.planHash
      return
    case 'skip':
      view.numSkipped++
      view.skipsInARow++
      view.commits.set(record.step, { sequence, record, weightsSha256: '' })
      view.committedStep = record.step
      return
    case 'commit':
      view.skipsInARow = 0
      view.commits.set(record.step, { sequence, record, weightsSha256: '' })
      view.committedStep = record.step
      return
    case 'checkpoint': {
      const commitSequence = view.commits.get(record.step)?.sequence ?? 0
      view.checkpoint = { ...record, commitSequence }
      for (const step of view.commits.keys()) {
        // Two more than the checkpoint needs: workers may lag by so much.
        if (step < record.step - 2) view.commits.delete(step)
      }
      return
    }
    case 'rollback':
      for (const [step, { record: gone }] of view.commits) {
        if (step <= record.toStep) continue
        if (gone.kind === 'skip') view.numSkipped--
        view.commits.delete(step)
      }
      view.skipsInARow = 0
      view.committedStep = record.toStep
      return
  }
}

/** The step that every replay can start from. */
export const checkpointStep = (view: LogView): number => view.checkpoint?.step ?? 0

/**
 * Is a worker's state at this step part of what the log still says? A step that was rolled back and
 * committed anew has another sequence.
 */
export function isTrueState(view: LogView, appliedStep: number, appliedSequence: number): boolean {
  if (appliedStep < 0 || appliedStep > view.committedStep) return false
  if (appliedStep === 0) return appliedSequence === 0
  const known = view.commits.get(appliedStep)?.sequence
  if (known !== undefined) return known === appliedSequence
  return view.checkpoint?.step === appliedStep && view.checkpoint.commitSequence === appliedSequence
}

/**
 * Device classes that computed each micro-batch of a committed step; null: skipped, nothing to
 * compute.
 */
export function recordedClasses(view: LogView, step: number): Map<string, number[]> | null {
  const committed = view.commits.get(step)
  if (!committed || committed.record.kind === 'skip') return null
  const classes = new Map<string, number[]>()
  for (const lease of committed.record.leases) {
    const microBatches = classes.get(lease.deviceClass) ?? []
    microBatches.push(...lease.microBatches)
    classes.set(lease.deviceClass, microBatches)
  }
  for (const microBatches of classes.values()) microBatches.sort((a, b) => a - b)
  return classes
}
