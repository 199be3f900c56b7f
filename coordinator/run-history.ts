/**
 * What a run remembers of a worker over its attachments, by what survives a restart: its host and
 * its place there. PROTOCOL.md §6.
 */
import type { CommitRecord } from '../proto/commit-record.js'
import type { RunFailure } from './run-events.js'
import type { FleetWorker, Run, WorkerHistory } from './run-state.js'

const maxHistories = 1_000

/** So many failures without a step in between that counts its work: trying again helps nobody. */
export const maxFailuresInARow = 3

/** It is gone while it took part: the next time it waits longer, unless it lasted. */
export function noteDeath(run: Run, worker: FleetWorker): void {
  const { firstBackoffMs, longestBackoffMs } = run.config.limits
  const history = historyOf(run, worker)
  const hasLasted = run.nowMs - history.untilMs > longestBackoffMs
  const deaths = hasLasted ? 1 : history.deaths + 1
  const waitMs = Math.min(longestBackoffMs, firstBackoffMs * 2 ** Math.min(deaths - 1, 30))
  const mustLoad = worker.appliedStep < run.log.committedStep
  keep(run, worker, { ...history, deaths, untilMs: run.nowMs + waitMs, mustLoad })
}

/** It has reported a failure. Answers how many these are in a row. */
export function noteFailure(run: Run, worker: FleetWorker, failure: RunFailure): number {
  const history = historyOf(run, worker)
  const failuresInARow = history.failuresInARow + 1
  keep(run, worker, { ...history, failuresInARow, lastFailure: failure })
  return failuresInARow
}

/** A step stands that counts their work. */
export function noteContributions(run: Run, { leases }: CommitRecord): void {
  if (run.histories.size === 0) return
  for (const { workerId } of leases) {
    const worker = run.workers.get(workerId)
    const history = worker && run.histories.get(worker.identity)
    if (history) Object.assign(history, { failuresInARow: 0, lastFailure: null })
  }
}

/** Why a worker is not taken again in this run; null: it may be. */
export function givenUpReason(run: Run, { identity }: { identity: string }): string | null {
  const history = run.histories.get(identity)
  if (!history?.lastFailure || history.failuresInARow < maxFailuresInARow) return null
  const { code, message } = history.lastFailure
  return (
    `WORKER_FAILED it failed ${history.failuresInARow} times in a row, and no step counted its ` +
    `work in between. The last time: ${code} ${message} Mend that on its host, start the worker ` +
    'again, and resume the job or submit the next one: it takes part in that.'
  )
}

export const isBackingOff = (run: Run, { identity }: FleetWorker): boolean =>
  (run.histories.get(identity)?.untilMs ?? 0) > run.nowMs

export const mustLoad = (run: Run, { identity }: FleetWorker): boolean =>
  run.histories.get(identity)?.mustLoad ?? false

const historyOf = (run: Run, { identity }: FleetWorker): WorkerHistory =>
  run.histories.get(identity) ?? {
    deaths: 0,
    untilMs: Number.NEGATIVE_INFINITY,
    mustLoad: false,
    failuresInARow: 0,
    lastFailure: null,
  }

function keep(run: Run, { identity }: FleetWorker, history: WorkerHistory): void {
  run.histories.delete(identity)
  run.histories.set(identity, history)
  const oldest = run.histories.keys().next().value
  if (run.histories.size > maxHistories && oldest !== undefined) run.histories.delete(oldest)
}
