/**
 * What goes into and comes out of a worker's run machine (worker/run-machine.ts), one job at a
 * time. The shell carries out the effects in order: engine calls queue on the engine's thread,
 * frames on the data plane (worker/data-plane.ts). What answers an effect says so.
 */
import type { LoggedRecord } from '../proto/commit-record.js'
import type { Deliver__Output } from '../proto/gen/tunemesh/v1/Deliver.js'
import type { Delivered } from '../proto/gen/tunemesh/v1/Delivered.js'
import type { ErrorInfo } from '../proto/gen/tunemesh/v1/ErrorInfo.js'
import type { Evaluate__Output } from '../proto/gen/tunemesh/v1/Evaluate.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { MemoryPlan } from '../proto/gen/tunemesh/v1/MemoryPlan.js'
import type { Prepare__Output } from '../proto/gen/tunemesh/v1/Prepare.js'
import type { ToWorker__Output } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { UpdateNumbers } from './engine.js'

/** One attempt at a lease of a step, in one fleet epoch. */
export interface LeaseKey {
  fleetEpoch: number
  step: number
  lease: number
  leaseAttempt: number
}

/** One attempt at a slice's sum. */
export interface SliceKey {
  fleetEpoch: number
  step: number
  slice: number
  sliceAttempt: number
}

export interface WorkerRunConfig {
  workerId: string
  /** As planned in the engine: contributions held at once. */
  numContributionSlots: number
  /** The last record is read when a step stands still this long. */
  doubtAfterMs: number
  /** A sum that a commit names and that did not come is asked for again this often. */
  requestSumEveryMs: number
}

export type WorkerEvent =
  /** From the coordinator's stream; Welcome, PlanCall and GenerateCall are the shell's own. */
  | { kind: 'message'; message: ToWorker__Output }
  /** The stream stands (again) after Welcome: `workerId` may be new. */
  | { kind: 'attached'; workerId: string }
  | { kind: 'detached' }
  // answers of the engine
  | {
      kind: 'enginePrepared'
      planHash: string
      memory: MemoryPlan
      numBlocks: number
      numTrainedParameters: number
      weightsSha256: string
      /** Of the engine as this job opened it. */
      deviceClass: string
    }
  | ({
      kind: 'microBatchDone'
      slot: number
      microBatch: number
      lossSum: number
      numTargetTokens: number
      numTokens: number
      computeMs: number
    } & LeaseKey)
  | ({
      kind: 'microBatchFailed'
      slot: number
      microBatch: number
      isChecked: boolean
      /** Of the gradient, or DEVICE_FAILED. */
      error: ErrorInfo
      tensor: string
    } & LeaseKey)
  /**
   * In a lease's last micro-batch: all of this slice stands in the slot, while backward goes on.
   * Each slice once, before microBatchDone. Linear digest of the contribution's slice, 16 digits.
   */
  | ({ kind: 'sliceReady'; slot: number; slice: number; digest: string } & LeaseKey)
  | { kind: 'updateApplied'; step: number; weightsSha256: string; applyMs: number }
  | {
      kind: 'stateUploaded'
      step: number
      purpose: string
      digest: string
      sizeBytes: number
      weightsSha256: string
    }
  | { kind: 'stateLoaded'; step: number; sequence: number; weightsSha256: string }
  | { kind: 'probeDone'; step: number; microBatch: number; digest: string }
  | { kind: 'evaluated'; step: number; split: string; lossSum: number; numTargetTokens: number }
  | { kind: 'delivered'; delivered: Delivered }
  | { kind: 'engineFailed'; operation: string; step: number; error: ErrorInfo }
  // from the data plane
  /** The owner has acknowledged every chunk of this contribution to this slice attempt. */
  | ({ kind: 'contributionDelivered' } & LeaseKey & Pick<SliceKey, 'slice' | 'sliceAttempt'>)
  /** As owner: every chunk of one attempt of a lease is here, checked, staged and not yet added. */
  | ({ kind: 'contributionArrived'; digest: string } & LeaseKey &
      Pick<SliceKey, 'slice' | 'sliceAttempt'>)
  /** As owner: the sum stands in the step's sum slot, rounded. */
  | ({
      kind: 'sliceFinished'
      sumDigest: string
      publishedDigest: string
      sumSquares: number
    } & SliceKey)
  /**
   * All chunks of a published sum are in the step's sum slot; `digest` computed from what is there.
   */
  | { kind: 'sumArrived'; step: number; slice: number; digest: string }
  /**
   * The first chunk of another attempt has overwritten a sum reported before: it does not stand.
   */
  | { kind: 'sumOverwritten'; step: number; slice: number }
  /** Another worker lacks a sum: answered by sendSum or refuseSum. */
  | { kind: 'sumRequested'; step: number; slice: number; digest: string; byWorkerId: string }
  /** The named worker does not have the sum (any more). */
  | { kind: 'sumUnavailable'; step: number; slice: number; fromWorkerId: string }
  | { kind: 'commitLogRead'; records: readonly LoggedRecord[] }
  | { kind: 'commitLogUnreadable'; reason: string }
  /** SIGTERM or Ctrl-C on this worker: leave between steps. */
  | { kind: 'drainAsked'; reason: string }
  /** At least every 250 ms. */
  | { kind: 'tick' }

export type WorkerEffect =
  | { kind: 'send'; message: FromWorker }
  // the engine, in order
  /** Answered by enginePrepared. */
  | { kind: 'prepareEngine'; prepare: Prepare__Output }
  | { kind: 'clearContribution'; slot: number }
  /** Answered by microBatchDone or microBatchFailed. */
  | ({
      kind: 'computeMicroBatch'
      slot: number
      microBatch: number
      packs: number[]
      lossDivisor: number
      /** The lease's last: sliceReady for each slice comes first. */
      isLast: boolean
      /** A device failed in it before: each operation is waited for. */
      isChecked: boolean
    } & LeaseKey)
  /** With the published gradient in sum slot step % 2; answered by updateApplied. */
  | { kind: 'applyUpdate'; step: number; update: UpdateNumbers }
  /** Answered by stateUploaded. */
  | { kind: 'uploadState'; step: number; purpose: string }
  /** Answered by stateLoaded. */
  | { kind: 'loadState'; step: number; digest: string; sequence: number }
  /**
   * Linear digest of one micro-batch's whole gradient, computed in a free slot; answered by
   * probeDone.
   */
  | {
      kind: 'probe'
      step: number
      slot: number
      microBatch: number
      packs: number[]
      lossDivisor: number
    }
  /** Answered by evaluated. */
  | { kind: 'evaluate'; evaluate: Evaluate__Output }
  /** Answered by delivered. */
  | { kind: 'deliver'; deliver: Deliver__Output }
  // the data plane
  /**
   * Listen to this epoch's sums, credits and requests; drop every frame and sender of other epochs.
   */
  | { kind: 'openEpoch'; fleetEpoch: number; workerIds: string[] }
  /** Send one slice of a contribution until acknowledged; answered by contributionDelivered. */
  | ({ kind: 'sendContribution'; slot: number; ownerWorkerId: string; digest: string } & LeaseKey &
      Pick<SliceKey, 'slice' | 'sliceAttempt'>)
  /** Stop sending this lease attempt's contribution, all slices: freed or void. */
  | ({ kind: 'cancelContribution'; slot: number } & LeaseKey)
  /** As owner: clear the slice's sum and listen for contributions under this attempt. */
  | ({ kind: 'openSlice' } & SliceKey)
  /** Stop listening; what is staged goes. */
  | ({ kind: 'closeSlice' } & SliceKey)
  /**
   * Add a staged contribution (`slot` null) or one of this worker's own slots to the slice's sum.
   */
  | ({ kind: 'countContribution'; slot: number | null } & LeaseKey &
      Pick<SliceKey, 'slice' | 'sliceAttempt'>)
  /** Drop a staged contribution: another attempt was complete first, or the lease is void. */
  | ({ kind: 'dropContribution' } & LeaseKey & Pick<SliceKey, 'slice' | 'sliceAttempt'>)
  /** Round the sum into the step's sum slot; answered by sliceFinished. */
  | ({ kind: 'finishSlice' } & SliceKey)
  | ({ kind: 'publishSum' } & SliceKey)
  /**
   * Ask one worker for a sum of a committed step; answered by sumArrived or sumUnavailable, or not
   * at all.
   */
  | { kind: 'requestSum'; step: number; slice: number; fromWorkerId: string; digest: string }
  | { kind: 'sendSum'; step: number; slice: number; toWorkerId: string }
  | { kind: 'refuseSum'; step: number; slice: number; toWorkerId: string }
  /** Which steps' sums may be written into the two sum slots as they arrive. */
  | { kind: 'acceptSums'; steps: number[] }
  // the rest
  /** Answered by commitLogRead: all records after the sequence. */
  | { kind: 'readCommitLog'; afterSequence: number }
  /** Forget the job: engine state, slots, subscriptions. */
  /** The device has failed and its state can't be trusted: another process must go on. */
  | { kind: 'restart'; reason: string }
  | { kind: 'releaseJob'; jobId: string }
  | { kind: 'exit'; reason: string }
  | { kind: 'log'; level: 'info' | 'warn' | 'error'; message: string }
