/** State of one job's training run on the coordinator. Only coordinator/run-*.ts changes it. */
import type {
  CheckpointRecord,
  CommitLogRecord,
  CommitRecord,
  SkipRecord,
} from '../proto/commit-record.js'
import { DataOrder } from '../proto/data-order.js'
import type { Applied__Output } from '../proto/gen/tunemesh/v1/Applied.js'
import type { Artifact__Output } from '../proto/gen/tunemesh/v1/Artifact.js'
import type { ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import { numSlices } from '../proto/slices.js'
import type { AttachedWorker, RunConfig, RunEffect, RunFailure, RunOutcome } from './run-events.js'
import type { StepRun } from './step-run.js'

export interface Run {
  readonly config: RunConfig
  readonly order: DataOrder
  nowMs: number
  /** Effects of the event in hand, in order. */
  effects: RunEffect[]
  log: LogView
  appends: Appends
  phase: 'opening' | 'gathering' | 'running' | 'ended'
  /** When the present gathering began; workers may come until gatherMs later. */
  gatheringSinceMs: number
  workers: Map<string, FleetWorker>
  /** What is remembered of workers over their attachments, by their identity. */
  histories: Map<string, WorkerHistory>
  /** Steps planned and not yet applied by every member: at most three. */
  steps: Map<number, StepRun>
  /** The last step planned or announced in this fleet epoch. */
  plannedThrough: number
  numSlices: number
  /** Trained elements' blocks, as the first worker reported them. */
  numBlocks: number
  checkpoint: CheckpointWork | null
  /** A checkpoint is due at the next committed step. */
  isCheckpointDue: boolean
  snapshot: SnapshotWork | null
  evaluation: { workerId: string; step: number; splits: Set<string> } | null
  delivery: { workerId: string; sinceMs: number } | null
  delivered: { artifacts: Artifact__Output[]; weightChangeJson: string } | null
  /** Set while paused: why, and when the checkpoint is tried again. */
  pause: { failure: RunFailure; retryAtMs: number } | null
  /** Stop once this step is committed, after a checkpoint. */
  stopAfterStep: number | null
  outcome: RunOutcome | null
  /** Why no worker will attach by itself any more. */
  exhausted: RunFailure | null
  /**
   * Step → micro-batch → how a device failed in it: whoever computes it next checks each operation.
   */
  suspects: Map<number, Map<number, string>>
  busLostAtMs: number | null
  lastTickMs: number | null
  /** The wait named last, so that each is named once. */
  namedStall: string
  lastCommitMs: number
  /** Longest apply reported for the last committed step: part of its exposed time. */
  lastApplyMs: number
  /** From plan to commit of the last step that was committed; 0: none yet. */
  lastStepMs: number
}

/** The commit log as far as decisions need it. */
export interface LogView {
  lastSequence: number
  fleetEpoch: number
  committedStep: number
  /** Commits and skips since the last checkpoint, its own step's included. */
  commits: Map<number, CommittedStep>
  checkpoint: (CheckpointRecord & { commitSequence: number }) | null
  planHash: string
  numSkipped: number
  /** Skipped since the last commit. */
  skipsInARow: number
}

interface CommittedStep {
  sequence: number
  record: CommitRecord | SkipRecord
  /** As the first worker reported that applied it; every other must report the same. */
  weightsSha256: string
}

interface Appends {
  queue: CommitLogRecord[]
  /** Sent and not yet known to stand or fail. */
  inFlight: {
    record: CommitLogRecord
    sinceMs: number
    /** When the last record is read next; null: an answer is awaited. */
    readAtMs: number | null
  } | null
  nextNumber: number
}

type JoinStage =
  /** Has the fleet's weights or lags at most two steps: follows the commits. */
  | 'following'
  /** Waits for a snapshot of a live worker, or loads it. */
  | 'snapshot'
  | 'loading'
  /** Asked, together with a member, for the digest of one micro-batch. */
  | 'probing'
  | 'proved'

export interface FleetWorker extends AttachedWorker {
  /** `member`: stands in the fleet epoch. */
  status: 'preparing' | 'ready' | 'joining' | 'member' | 'refused' | 'drained'
  stage: JoinStage | null
  stageSinceMs: number
  lastHeardMs: number
  /** The step its weights stand at; -1: not known or none. */
  appliedStep: number
  appliedSequence: number
  weightsSha256: string
  /**
   * Reported before this coordinator knew that the step stands: the worker read it in the log. At
   * most two, as many as a worker is ahead.
   */
  appliedAhead: Applied__Output[]
  isDraining: boolean
  /** Told to load a checkpoint or snapshot, and not done. */
  loadingStep: number | null
  /** Micro-batches per millisecond, smoothed. */
  speed: number
  tokensPerSecond: number
  numBlocks: number
  planHash: string
  probe: {
    step: number
    microBatch: number
    partnerId: string
    own: string
    partner: string
  } | null
  /** Of its files hashed, fetched or sent, as last told. */
  progressBytes: number
}

export interface WorkerHistory {
  /** Lately. */
  deaths: number
  /** Until then it waits before it joins again. */
  untilMs: number
  /** Could not catch up by sums alone: takes a snapshot next time. */
  mustLoad: boolean
  /** Reported, without a step in between that counted its work. */
  failuresInARow: number
  lastFailure: RunFailure | null
}

interface CheckpointWork {
  step: number
  workerId: string
  stage: 'uploading' | 'storing' | 'recording'
  sinceMs: number
  stateDigest: string
  sizeBytes: number
  weightsSha256: string
}

interface SnapshotWork {
  step: number
  donorId: string
}

export function newRun(config: RunConfig): Run {
  return {
    config,
    order: new DataOrder(config.dataOrder),
    nowMs: 0,
    effects: [],
    log: emptyLog(),
    appends: { queue: [], inFlight: null, nextNumber: 1 },
    phase: 'opening',
    gatheringSinceMs: 0,
    workers: new Map(),
    histories: new Map(),
    steps: new Map(),
    plannedThrough: 0,
    numSlices: 0,
    numBlocks: 0,
    checkpoint: null,
    isCheckpointDue: false,
    snapshot: null,
    evaluation: null,
    delivery: null,
    delivered: null,
    pause: null,
    stopAfterStep: null,
    outcome: null,
    exhausted: null,
    suspects: new Map(),
    busLostAtMs: null,
    lastTickMs: null,
    namedStall: '',
    lastCommitMs: 0,
    lastApplyMs: 0,
    lastStepMs: 0,
  }
}

export const emptyLog = (): LogView => ({
  lastSequence: 0,
  fleetEpoch: 0,
  committedStep: 0,
  commits: new Map(),
  checkpoint: null,
  planHash: '',
  numSkipped: 0,
  skipsInARow: 0,
})

export const numSlicesOf = (config: RunConfig, numBlocks: number): number =>
  numSlices({ numBlocks, sliceBlocks: config.prepare.sliceBlocks ?? 1 })

// ---- what every part asks ----

export const members = (run: Run): FleetWorker[] =>
  [...run.workers.values()].filter((worker) => worker.status === 'member')

/** Members, and joiners whose weights follow the commits (or will, once loaded). */
export const audience = (run: Run): FleetWorker[] =>
  [...run.workers.values()].filter(
    (worker) =>
      worker.status === 'member' || (worker.status === 'joining' && worker.stage !== 'snapshot'),
  )

/** The step a worker stands at or is about to load: sums of two more may be on their way. */
export const gateStep = (worker: FleetWorker): number => worker.loadingStep ?? worker.appliedStep

export const isMember = (run: Run, workerId: string): boolean =>
  run.workers.get(workerId)?.status === 'member'

/** Every member has applied this step. */
export const appliedByAll = (run: Run): number =>
  Math.min(...members(run).map((worker) => worker.appliedStep))

export const send = (run: Run, workerId: string, message: ToWorker): void => {
  run.effects.push({ kind: 'send', workerId, message })
}

export const log = (run: Run, level: 'info' | 'warn' | 'error', message: string): void => {
  run.effects.push({ kind: 'log', level, message })
}

/** Ends the run; later events change nothing. */
export function finish(run: Run, outcome: RunOutcome): void {
  if (run.phase === 'ended') return
  run.phase = 'ended'
  run.outcome = outcome
  run.steps.clear()
  run.effects.push({ kind: 'finish', outcome })
  if (outcome.kind === 'fenced') return
  for (const worker of run.workers.values()) {
    if (worker.status !== 'refused') {
      send(run, worker.workerId, { releaseJob: { jobId: run.config.jobId } })
    }
  }
}

export const fail = (run: Run, failure: RunFailure): void =>
  finish(run, { kind: 'failed', step: run.log.committedStep, failure })
