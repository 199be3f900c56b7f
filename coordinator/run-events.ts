/**
 * What goes into and comes out of a job's run machine (coordinator/run-machine.ts). The shell turns
 * sockets, the log and the clock into events and carries out the effects in order; it decides
 * nothing.
 */
import type { CommitLogRecord, LoggedRecord } from '../proto/commit-record.js'
import type { DataOrderOptions } from '../proto/data-order.js'
import type { ErrorCode } from '../proto/errors.js'
import type { Artifact__Output } from '../proto/gen/tunemesh/v1/Artifact.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { Prepare } from '../proto/gen/tunemesh/v1/Prepare.js'
import type { ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { Precision } from '../proto/train-spec.js'

export interface RunConfig {
  jobId: string
  /** Unique to this run of the coordinator: tells its appends from those of another. */
  coordinatorId: string
  dataOrder: DataOrderOptions
  /** Trained tokens (or their weights) and tokens of each pack, by pack index. */
  targetsPerPack: ArrayLike<number>
  tokensPerPack: ArrayLike<number>
  /** Learning rate of each step, float64, step 1 first. */
  learningRates: readonly number[]
  beta1: number
  beta2: number
  /** 0: no clipping. */
  maxGradNorm: number
  onNonFinite: 'stop' | 'skip'
  /** 0: only at the end and on stop. */
  checkpointEverySteps: number
  /** 0: only at the end. */
  evaluateEverySteps: number
  /** Also before the first step. */
  evaluateOnStart: boolean
  /** Names of the validation sets; empty: nothing is evaluated. */
  evaluationSplits: readonly string[]
  /** Everything a worker needs; the machine sends it to each one that attaches. */
  prepare: Prepare
  outputDir: string
  baseModelName: string
  /** Workers whose devices lack it are left idle. */
  precision: Precision
  /** Else in free mode: what is computed again has other bits, and nothing may compare it. */
  isDeterministic: boolean
  /**
   * The first fleet is formed when so many workers are ready, or `gatherMs` have passed with one.
   */
  wantedWorkers: number
  limits: RunLimits
}

export interface RunLimits {
  /** Silence after which a worker counts as dead. */
  deadAfterMs: number
  /** How long a new coordinator waits for workers that may still hold state. */
  gatherMs: number
  /** No worker at all for so long fails the job: NO_WORKERS. */
  noWorkersMs: number
  /** A wait longer than this is named in an event. */
  stallAfterMs: number
  /** A worker that lets others wait longer than this counts as dead. */
  giveUpAfterMs: number
  /** Preparing, loading a snapshot and catching up, each. */
  joinStageMs: number
  /** First back-off of a worker that died; doubles with each death, up to the longest. */
  firstBackoffMs: number
  longestBackoffMs: number
  /** How often a refused checkpoint is tried again while the job is paused. */
  checkpointRetryMs: number
  /** The last record is read this long after an append that nobody answered, and again. */
  appendRetryMs: number
}

export const defaultRunLimits: RunLimits = {
  deadAfterMs: 10_000,
  gatherMs: 3_000,
  noWorkersMs: 600_000,
  stallAfterMs: 5_000,
  // Its heartbeats still come: a lease of a large model on a slow device takes minutes.
  giveUpAfterMs: 1_800_000,
  joinStageMs: 300_000,
  firstBackoffMs: 1_000,
  longestBackoffMs: 60_000,
  checkpointRetryMs: 5_000,
  appendRetryMs: 500,
}

export interface RunFailure {
  code: ErrorCode
  message: string
}

export type RunEvent =
  /** First event, and the answer to `readLog`: the whole commit log of the job, oldest first. */
  | { kind: 'started'; log: readonly LoggedRecord[] }
  /**
   * A worker's stream stands, its Hello was accepted. Also after a lost stream, under its old id.
   */
  | { kind: 'workerAttached'; worker: AttachedWorker }
  /** Its stream broke or ended. */
  | { kind: 'workerLost'; workerId: string; reason: string }
  /** Workers that crash over and over are not started again: without others the job fails. */
  | { kind: 'workersExhausted'; failure: RunFailure }
  /** Every message of an attached worker but Hello; heartbeats too: they prove that it lives. */
  | { kind: 'message'; workerId: string; message: FromWorker__Output }
  | { kind: 'appendAcknowledged'; sequence: number }
  /** JetStream said: wrong last sequence. */
  | { kind: 'appendRefused' }
  /** Timed out or the connection broke: it may stand or not. */
  | { kind: 'appendUnknown' }
  /** Answer to `readLastRecord`; null: the subject is empty. */
  | { kind: 'lastRecordRead'; last: LoggedRecord | null }
  | { kind: 'lastRecordUnreadable'; reason: string }
  | { kind: 'checkpointStored'; step: number; manifestDigest: string }
  | { kind: 'checkpointFailed'; step: number; failure: RunFailure }
  /** NATS went away or came back: deadlines rest meanwhile. */
  | { kind: 'busLost' }
  | { kind: 'busBack' }
  | { kind: 'stopAsked'; now: boolean }
  /** Goes on from a pause (disk full) at once. */
  | { kind: 'resumeAsked' }
  /** At least every 250 ms. */
  | { kind: 'tick' }

export interface AttachedWorker {
  workerId: string
  /** Of its host and its place there: the same after a restart of the process. */
  identity: string
  deviceClass: string
  host: string
  device: string
  /** What the device computes in, by its Hello. */
  precisions: readonly string[]
}

export type RunEffect =
  | { kind: 'send'; workerId: string; message: ToWorker }
  /**
   * At most one is out at a time. Answered by appendAcknowledged, appendRefused or appendUnknown.
   */
  | { kind: 'append'; record: CommitLogRecord; expectedLastSequence: number }
  | { kind: 'readLastRecord' }
  /** Answered by another `started`: somebody appended while this coordinator was starting. */
  | { kind: 'readLog' }
  /** The body of a JobEvent: exactly one of its oneof fields. */
  | { kind: 'event'; event: JobEvent }
  /**
   * Make the manifest durable (temporary folder, fsync, rename); answer checkpointStored or
   * -Failed.
   */
  | { kind: 'storeCheckpoint'; manifest: CheckpointManifest }
  /**
   * End the worker's stream: it counts as dead and must attach anew. No workerLost event follows.
   */
  | { kind: 'disconnect'; workerId: string; reason: string }
  | { kind: 'finish'; outcome: RunOutcome }
  | { kind: 'log'; level: 'info' | 'warn' | 'error'; message: string; workerId?: string }

export interface CheckpointManifest {
  jobId: string
  step: number
  /** Blob written by the worker's `writeState`. */
  stateDigest: string
  sizeBytes: number
  weightsSha256: string
  /** Sequence of the step's commit in the log; 0: the start. */
  commitSequence: number
}

export type RunOutcome =
  | {
      kind: 'succeeded'
      step: number
      weightsSha256: string
      artifacts: Artifact__Output[]
      weightChangeJson: string
    }
  /** Asked for; resumable from `checkpointStep`. */
  | { kind: 'stopped'; step: number; checkpointStep: number }
  | { kind: 'failed'; step: number; failure: RunFailure }
  /** Another coordinator has raised the epoch: this one must not touch the job any more. */
  | { kind: 'fenced'; byCoordinatorId: string }
