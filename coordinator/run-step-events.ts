/** What is told of a step that now stands: committed or skipped. */
import type { CommitRecord, SkipRecord } from '../proto/commit-record.js'
import type { Run } from './run-state.js'

export function reportStep(run: Run, record: CommitRecord): void {
  const { config, order } = run
  const stepRun = run.steps.get(record.step)
  const stepMs = run.nowMs - (stepRun?.startedAtMs ?? run.nowMs)
  run.lastStepMs = stepMs
  const exposedMs = run.nowMs - (stepRun?.lastLeaseDoneMs ?? run.nowMs) + run.lastApplyMs
  const counts = new Map<string, number>()
  for (const lease of record.leases) {
    counts.set(lease.workerId, (counts.get(lease.workerId) ?? 0) + lease.microBatches.length)
  }
  run.effects.push({
    kind: 'event',
    event: {
      step: {
        step: record.step,
        numSteps: order.numSteps,
        loss: record.lossSum / record.lossDivisor,
        gradNorm: record.update.gradNorm,
        learningRate: config.learningRates[record.step - 1] ?? 0,
        numTargetTokens: record.numTargetTokens,
        numTokens: record.numTokens,
        stepMs,
        exposedMs,
        tokensPerSecond: stepMs > 0 ? (record.numTokens * 1000) / stepMs : 0,
        dataEpoch: order.dataEpochsThrough(record.step),
        etaMs: Math.round(stepMs * (order.numSteps - record.step)),
        shares: [...counts].map(([workerId, numMicroBatches]) => ({
          workerId,
          numMicroBatches,
          tokensPerSecond: run.workers.get(workerId)?.tokensPerSecond ?? 0,
        })),
        fleetEpoch: record.fleetEpoch,
      },
    },
  })
}

export function reportSkip(run: Run, record: SkipRecord): void {
  const { step, microBatch, tensor, reason, fleetEpoch } = record
  const { numSteps } = run.order
  const dataEpoch = run.order.dataEpochsThrough(step)
  const etaMs = Math.round(run.lastStepMs * (numSteps - step))
  run.effects.push({
    kind: 'event',
    event: {
      stepSkipped: { step, numSteps, microBatch, tensor, reason, dataEpoch, etaMs, fleetEpoch },
    },
  })
}
