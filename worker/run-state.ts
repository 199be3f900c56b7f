/** State of a worker's part in a job. Only worker/run-*.ts changes it. */
import type { Commit__Output } from '../proto/gen/tunemesh/v1/Commit.js'
import type { Deliver__Output } from '../proto/gen/tunemesh/v1/Deliver.js'
import type { Evaluate__Output } from '../proto/gen/tunemesh/v1/Evaluate.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { MicroBatchLoss } from '../proto/gen/tunemesh/v1/MicroBatchLoss.js'
import type { Prepare__Output } from '../proto/gen/tunemesh/v1/Prepare.js'
import type { Probe__Output } from '../proto/gen/tunemesh/v1/Probe.js'
import type { StepPlan__Output } from '../proto/gen/tunemesh/v1/StepPlan.js'
import type {
  LeaseKey,
  SliceKey,
  WorkerEffect,
  WorkerEvent,
  WorkerRunConfig,
} from './run-events.js'

type EnginePrepared = Extract<WorkerEvent, { kind: 'enginePrepared' }>

export interface WorkerRun {
  readonly config: WorkerRunConfig
  workerId: string
  nowMs: number
  /** Effects of the event in hand, in order. */
  effects: WorkerEffect[]
  jobId: string
  prepare: Prepare__Output | null
  prepared: EnginePrepared | null
  numSlices: number
  /** Prepared must still be answered: the state is on its way to another step. */
  owesPrepared: boolean
  isDraining: boolean
  /** The step the weights stand at; -1: being loaded. */
  appliedStep: number
  appliedSequence: number
  weightsSha256: string
  /** Handed to the engine and not yet done. */
  applying: PendingCommit | null
  loading: { step: number; sequence: number } | null
  fleetEpoch: number
  workerIds: string[]
  /** By step: the one under way and at most the next. */
  plans: Map<number, StepPlan__Output>
  contributions: Map<string, Contribution>
  /** Which contribution (or probe) has each slot. */
  slots: (string | null)[]
  computing: Contribution | null
  ownedSlices: Map<string, OwnedSlice>
  /** Step → slice → digest of the sum that stands in the step's sum slot. */
  sums: Map<number, Map<number, string>>
  acceptedSums: string
  commits: Map<number, PendingCommit>
  /** To be done when the weights stand at exactly that step, before anything else. */
  pending: PendingWork[]
  lastCommitLogReadMs: number
  lastProgressMs: number
}

export interface PendingCommit {
  step: number
  sequence: number
  isSkipped: boolean
  /** Digest of each slice's published sum. */
  digests: string[]
  update: Commit__Output['update']
  sinceMs: number
  /** Missing sums were asked for last, and how often. */
  askedAtMs: number
  numAsked: number
  numRefused: number
}

export interface Contribution extends LeaseKey {
  microBatches: number[]
  /** null: all slices. */
  onlySlices: number[] | null
  state: 'waiting' | 'computing' | 'done' | 'failed' | 'dropped'
  /** -1: none. */
  slot: number
  losses: MicroBatchLoss[]
  computeMs: number
  /** Of each slice that stands in the slot: the last micro-batch has finished it. */
  digests: Map<number, string>
  /** Slice → slice attempt that it is being sent to, or was counted in. */
  sent: Map<number, number>
  delivered: Map<number, number>
  /** The delivery reported last. */
  reported: string
}

/** The slice stands in the contribution's slot: to be sent and counted, before LeaseDone too. */
export const stands = ({ state, digests }: Contribution, slice: number): boolean =>
  (state === 'computing' || state === 'done') && digests.has(slice)

export interface OwnedSlice extends SliceKey {
  state: 'waiting' | 'open' | 'finishing' | 'done'
  /** Lease → attempt that counted: the first that was complete. */
  counted: Map<number, number>
  lastContributionMs: number
}

export type PendingWork =
  | { kind: 'uploadState'; step: number; purpose: string }
  | { kind: 'probe'; step: number; probe: Probe__Output }
  | { kind: 'evaluate'; step: number; evaluate: Evaluate__Output }
  | { kind: 'deliver'; step: number; deliver: Deliver__Output }

export const newWorkerRun = (config: WorkerRunConfig): WorkerRun => ({
  config,
  workerId: config.workerId,
  nowMs: 0,
  effects: [],
  jobId: '',
  prepare: null,
  prepared: null,
  numSlices: 0,
  owesPrepared: false,
  isDraining: false,
  appliedStep: 0,
  appliedSequence: 0,
  weightsSha256: '',
  applying: null,
  loading: null,
  fleetEpoch: 0,
  workerIds: [],
  plans: new Map(),
  contributions: new Map(),
  slots: Array.from({ length: config.numContributionSlots }, () => null),
  computing: null,
  ownedSlices: new Map(),
  sums: new Map(),
  acceptedSums: '',
  commits: new Map(),
  pending: [],
  lastCommitLogReadMs: 0,
  lastProgressMs: 0,
})

export const leaseKey = (key: LeaseKey): LeaseKey => ({
  fleetEpoch: key.fleetEpoch,
  step: key.step,
  lease: key.lease,
  leaseAttempt: key.leaseAttempt,
})

export const sliceKey = (key: SliceKey): SliceKey => ({
  fleetEpoch: key.fleetEpoch,
  step: key.step,
  slice: key.slice,
  sliceAttempt: key.sliceAttempt,
})

export const leaseName = (key: LeaseKey): string => `${key.step}/${key.lease}/${key.leaseAttempt}`
export const sliceName = (key: Pick<SliceKey, 'step' | 'slice'>): string =>
  `${key.step}/${key.slice}`

export const send = (run: WorkerRun, message: FromWorker): void => {
  run.effects.push({ kind: 'send', message })
}

/** Neither on the way to another step nor without an engine. */
export const isSettled = (run: WorkerRun): boolean =>
  run.prepared !== null && run.applying === null && run.loading === null
