/**
 * Events of steps that the commit log has and the event log lacks. A commit stands once JetStream
 * has acknowledged it; a coordinator that was killed right after it has told nobody, so the next
 * one must: who watches sees every step once.
 */
import type { CommitRecord, LoggedRecord } from '../proto/commit-record.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'

export interface UntoldSteps {
  log: readonly LoggedRecord[]
  /** Steps with an event. */
  told: ReadonlySet<number>
  numSteps: number
  dataEpochsThrough: (step: number) => number
}

export function untoldSteps({ log, told, numSteps, dataEpochsThrough }: UntoldSteps): JobEvent[] {
  const standing = standingCommits(log)
  return [...standing.values()]
    .filter(({ step }) => !told.has(step))
    .map((record) => {
      const stepMs = record.timeMs - (standing.get(record.step - 1)?.timeMs ?? record.timeMs)
      return {
        step: {
          step: record.step,
          numSteps,
          loss: record.lossSum / record.lossDivisor,
          gradNorm: record.update.gradNorm,
          learningRate: record.update.learningRate,
          numTargetTokens: record.numTargetTokens,
          numTokens: record.numTokens,
          stepMs,
          tokensPerSecond: stepMs > 0 ? (record.numTokens * 1000) / stepMs : 0,
          dataEpoch: dataEpochsThrough(record.step),
          shares: record.leases.map(({ workerId, microBatches }) => ({
            workerId,
            numMicroBatches: microBatches.length,
          })),
          fleetEpoch: record.fleetEpoch,
        },
      }
    })
}

/** Without the steps that were rolled back. */
function standingCommits(log: readonly LoggedRecord[]): Map<number, CommitRecord> {
  const standing = new Map<number, CommitRecord>()
  for (const { record } of log) {
    if (record.kind === 'commit') standing.set(record.step, record)
    if (record.kind !== 'rollback') continue
    for (const step of [...standing.keys()]) if (step > record.toStep) standing.delete(step)
  }
  return standing
}
