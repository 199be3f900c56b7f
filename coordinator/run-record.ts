/** run.json beside the result: all that is needed to judge a run, or to repeat it. */
import type { LoggedRecord } from '../proto/commit-record.js'
import type { WorkerInfo } from '../proto/gen/tunemesh/v1/WorkerInfo.js'
import { version } from '../proto/version.js'
import type { StoredEvent } from './event-log.js'
import { isDeterministic, statesOf } from './job-precision.js'
import type { JobRecord } from './job-store.js'
import type { SettledJob } from './prepared-job.js'
import type { RunOutcome } from './run-events.js'

export interface RunRecordParts {
  job: JobRecord
  prepared: SettledJob
  outcome: RunOutcome & { kind: 'succeeded' }
  events: StoredEvent[]
  commits: LoggedRecord[]
  workers: WorkerInfo[]
}

export function runRecord(parts: RunRecordParts) {
  const { job, prepared, outcome, events, commits, workers } = parts
  const records = commits.map(({ record }) => record)
  const leases = records.flatMap((record) => (record.kind === 'commit' ? record.leases : []))
  return {
    jobId: job.jobId,
    tunemeshVersion: version,
    jobFile: job.jobFile,
    overrides: job.overrides,
    spec: prepared.spec,
    precision: prepared.precision,
    states: statesOf(prepared),
    mode: isDeterministic(prepared.spec) ? 'deterministic' : 'free',
    model: { path: prepared.modelPath, digest: prepared.modelDigest },
    data: {
      train: prepared.train.shard.digest,
      validation: prepared.validation?.shard.digest ?? null,
    },
    deviceClasses: [...new Set(leases.map((lease) => lease.deviceClass))].sort(),
    weightsSha256: outcome.weightsSha256,
    artifacts: outcome.artifacts,
    weightChange: parsed(outcome.weightChangeJson),
    preflight: events.find((event) => event.preflight)?.preflight ?? null,
    memoryPredicted: events.find((event) => event.plan)?.plan?.memory ?? null,
    /** Resident bytes at the end; other parts of the process are in it too. */
    memoryActual: workers.map(({ workerId, memoryBytes }) => ({ workerId, memoryBytes })),
    startedAtMs: job.startedAtMs,
    ...times(job, events),
    steps: lastOfEachStep(events),
    evaluations: events.flatMap((event) => (event.evaluation ? [event.evaluation] : [])),
    checkpoints: records.filter((record) => record.kind === 'checkpoint').map((r) => r.step),
    skippedSteps: records.filter((record) => record.kind === 'skip').map((r) => r.step),
    rollbacks: records.filter((record) => record.kind === 'rollback'),
  }
}

/** Of the steps: as the plan estimated it (null: nobody had measured), and as it was. */
function times(job: JobRecord, events: StoredEvent[]) {
  const plan = events.find((event) => event.plan)?.plan
  const last = events.findLast((event) => event.step)
  return {
    secondsPredicted: plan?.estimatedSeconds || null,
    secondsPredictedBasis: plan?.timeBasis ?? '',
    /** From the start of the run: loading the model, checkpoints and evaluations are in it. */
    secondsActual: last ? (last.timeMs - job.startedAtMs) / 1_000 : null,
  }
}

/** A rolled-back step was told twice; the later telling is the true one. */
function lastOfEachStep(events: StoredEvent[]) {
  const steps = new Map<number, object>()
  for (const { step, timeMs } of events) if (step?.step) steps.set(step.step, { ...step, timeMs })
  return [...steps.entries()].sort(([a], [b]) => a - b).map(([, step]) => step)
}

function parsed(json: string): unknown {
  try {
    return JSON.parse(json)
  } catch {
    return null // an older worker had none
  }
}
