/**
 * Events of steps that the commit log has and the event log lacks. A commit stands once JetStream
 * has acknowledged it; a coordinator that was killed right after it has told nobody, so the next
 * one must: who watches sees every step once.
 */
import type { CommitRecord, LoggedRecord, SkipRecord } from '../proto/commit-record.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'

export interface UntoldSteps {
  log: readonly LoggedRecord[]
  /** Steps with an event. */
  told: ReadonlySet<number>
  numSteps: number
  dataEpochsThrough: (step: number) => number
}

export function untoldSteps(options: UntoldSteps): JobEvent[] {
  const standing = standingSteps(options.log)
  return [...standing.values()]
    .filter(({ step }) => !options.told.has(step))
    .map((record) => {
      const { step, fleetEpoch } = record
      const common = {
        step,
        numSteps: options.numSteps,
        dataEpoch: options.dataEpochsThrough(step),
        fleetEpoch,
      }
      if (record.kind === 'skip') {
        const { microBatch, tensor, reason } = record
        return { stepSkipped: { ...common, microBatch, tensor, reason } }
      }
      const stepMs = record.timeMs - (standing.get(step - 1)?.timeMs ?? record.timeMs)
      return { step: { ...common, ...told(record, stepMs) } }
    })
}

function told(record: CommitRecord, stepMs: number) {
  const { lossSum, lossDivisor, numTargetTokens, numTokens, update, leases } = record
  return {
    loss: lossSum / lossDivisor,
    gradNorm: update.gradNorm,
    learningRate: update.learningRate,
    numTargetTokens,
    numTokens,
    stepMs,
    tokensPerSecond: stepMs > 0 ? (numTokens * 1000) / stepMs : 0,
    shares: leases.map(({ workerId, microBatches }) => ({
      workerId,
      numMicroBatches: microBatches.length,
    })),
  }
}

/** Without the steps that were rolled back. */
function standingSteps(log: readonly LoggedRecord[]): Map<number, CommitRecord | SkipRecord> {
  const standing = new Map<number, CommitRecord | SkipRecord>()
  for (const { record } of log) {
    if (record.kind === 'commit' || record.kind === 'skip') standing.set(record.step, record)
    if (record.kind !== 'rollback') continue
    for (const step of [...standing.keys()]) if (step > record.toStep) standing.delete(step)
  }
  return standing
}
