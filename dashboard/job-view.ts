/**
 * What the page knows of one job: its events, reduced.
 *
 * Keyed by sequence: an event that was applied already changes nothing, and a hole is reported
 * instead of skipped, so any mixture of reloads, reconnects and repeats ends in the same view.
 */
import type { JobState__Output as JobState } from '../proto/gen/tunemesh/v1/JobState.js'
import { type EventLine, linesOfEvent } from './event-lines.js'
import type { FeedEvent } from './feed-messages.js'

export interface StepPoint {
  step: number
  timeMs: number
  loss: number | null
  gradNorm: number | null
  learningRate: number
  tokensPerSecond: number
  stepMs: number
  exposedMs: number
  /** Tokens of all steps so far. */
  tokensSoFar: number
}

export interface WorkerRow {
  workerId: string
  host: string
  device: string
  state: string
  tokensPerSecond: number
  /** Of the last step's micro-batches. */
  share: number
  memoryBytes: number
  /** In its own words, where that is more than its state. */
  doing: string
}

export interface Mark {
  step: number
  kind: 'fleet' | 'checkpoint' | 'stall' | 'skip'
}

type Preflight = NonNullable<FeedEvent['preflight']>
type PlanOutline = NonNullable<FeedEvent['plan']>
type Artifacts = NonNullable<FeedEvent['artifacts']>

const maxLines = 500

export class JobView {
  lastSequence = 0
  state: JobState = 'JOB_STATE_UNSPECIFIED'
  stateSinceMs = 0
  startedAtMs: number | null = null
  error: { code: string; message: string; details: string[] } | null = null
  numSteps = 0
  etaMs = 0
  /** When that was estimated. */
  etaAtMs = 0
  dataEpoch = 0
  fleetEpoch = 0
  points: StepPoint[] = []
  evaluations: { step: number; loss: number }[] = []
  marks: Mark[] = []
  /** They changed no weight and have no point. */
  skippedSteps: number[] = []
  workers: WorkerRow[] = []
  lines: EventLine[] = []
  preflight: Preflight | null = null
  plan: PlanOutline | null = null
  artifacts: Artifacts | null = null

  constructor(readonly jobId: string) {}

  /** Committed or skipped last. */
  get step(): number {
    return Math.max(this.points.at(-1)?.step ?? 0, this.skippedSteps.at(-1) ?? 0)
  }

  /** @returns false where events are missing in between: read again after `lastSequence` */
  apply(events: readonly FeedEvent[]): boolean {
    for (const event of events) {
      if (event.sequence <= this.lastSequence) continue
      if (event.sequence > this.lastSequence + 1) return false
      this.lastSequence = event.sequence
      this.#applyOne(event)
      this.lines.push(...linesOfEvent(event))
    }
    if (this.lines.length > maxLines) this.lines = this.lines.slice(-maxLines)
    return true
  }

  #applyOne(event: FeedEvent): void {
    if (event.step) this.#applyStep(event.step, event.timeMs)
    else if (event.stepSkipped) this.#applySkip(event.stepSkipped, event.timeMs)
    else if (event.stateChanged) this.#applyState(event.stateChanged, event.timeMs)
    else if (event.fleet) this.#applyFleet(event.fleet)
    else if (event.preflight) this.preflight = event.preflight
    else if (event.plan) this.#applyPlan(event.plan)
    else if (event.artifacts) this.artifacts = event.artifacts
    else if (event.evaluation) {
      const { step = 0, loss = 0 } = event.evaluation
      this.evaluations = this.evaluations.filter((it) => it.step < (step ?? 0))
      this.evaluations.push({ step: step ?? 0, loss: loss ?? 0 })
    } else if (event.checkpoint) {
      this.marks.push({ step: event.checkpoint.step ?? 0, kind: 'checkpoint' })
    } else if (event.stalled) this.marks.push({ step: this.step, kind: 'stall' })
  }

  /** After a rollback or a resume steps come again: what lies ahead of them is void. */
  #applyStep(step: NonNullable<FeedEvent['step']>, timeMs: number): void {
    const number = this.#reach(step, timeMs)
    this.points.push({
      step: number,
      timeMs,
      loss: finite(step.loss),
      gradNorm: finite(step.gradNorm),
      learningRate: step.learningRate ?? 0,
      tokensPerSecond: step.tokensPerSecond ?? 0,
      stepMs: step.stepMs ?? 0,
      exposedMs: step.exposedMs ?? 0,
      tokensSoFar: (this.points.at(-1)?.tokensSoFar ?? 0) + (step.numTokens ?? 0),
    })
    this.#applyShares(step.shares ?? [])
  }

  #applySkip(skipped: NonNullable<FeedEvent['stepSkipped']>, timeMs: number): void {
    const step = this.#reach(skipped, timeMs)
    this.skippedSteps.push(step)
    this.marks.push({ step, kind: 'skip' })
  }

  /** Answers the number of the step that the run has come to. */
  #reach(told: NonNullable<FeedEvent['step'] | FeedEvent['stepSkipped']>, timeMs: number): number {
    const number = told.step ?? 0
    while ((this.points.at(-1)?.step ?? -1) >= number) this.points.pop()
    while ((this.skippedSteps.at(-1) ?? -1) >= number) this.skippedSteps.pop()
    this.evaluations = this.evaluations.filter((it) => it.step <= number)
    this.marks = this.marks.filter((it) => it.step <= number && !isVoid(it, number))
    this.numSteps = told.numSteps ?? this.numSteps
    this.etaMs = told.etaMs ?? 0
    this.etaAtMs = timeMs
    this.dataEpoch = told.dataEpoch ?? 0
    this.fleetEpoch = told.fleetEpoch ?? this.fleetEpoch
    return number
  }

  #applyShares(shares: NonNullable<NonNullable<FeedEvent['step']>['shares']>): void {
    const total = shares.reduce((sum, share) => sum + (share.numMicroBatches ?? 0), 0)
    const byId = new Map(shares.map((share) => [share.workerId ?? '', share]))
    this.workers = this.workers.map((worker) => ({
      ...worker,
      share: total === 0 ? 0 : (byId.get(worker.workerId)?.numMicroBatches ?? 0) / total,
    }))
    for (const [workerId, share] of byId) {
      const row = this.workers.find((worker) => worker.workerId === workerId)
      const tokensPerSecond = share.tokensPerSecond ?? 0
      if (row) row.tokensPerSecond = tokensPerSecond
      else {
        const part = (share.numMicroBatches ?? 0) / Math.max(1, total)
        this.workers.push({ ...unknownWorker(workerId), share: part, tokensPerSecond })
      }
    }
  }

  #applyState(changed: NonNullable<FeedEvent['stateChanged']>, timeMs: number): void {
    this.state = changed.state ?? 'JOB_STATE_UNSPECIFIED'
    this.stateSinceMs = timeMs
    if (this.state === 'RUNNING') this.startedAtMs ??= timeMs
    const { error } = changed
    this.error = error?.code
      ? { code: error.code, message: error.message ?? '', details: error.details ?? [] }
      : null
  }

  #applyFleet(fleet: NonNullable<FeedEvent['fleet']>): void {
    this.fleetEpoch = fleet.fleetEpoch ?? this.fleetEpoch
    this.workers = workerRows(fleet.workers ?? [], this.workers)
    if (this.step > 0) this.marks.push({ step: this.step, kind: 'fleet' })
  }

  #applyPlan(plan: PlanOutline): void {
    this.plan = plan
    this.numSteps = plan.numSteps ?? this.numSteps
    if (plan.preflight) this.preflight = plan.preflight
  }
}

/** That a step was skipped is void where it comes again. */
const isVoid = (mark: Mark, step: number) => mark.kind === 'skip' && mark.step === step

type FeedWorker = NonNullable<NonNullable<FeedEvent['fleet']>['workers']>[number]

/** Rows of a fleet; a share and speed that were known stay until the next step tells new ones. */
function workerRows(workers: readonly FeedWorker[], before: readonly WorkerRow[]) {
  const known = new Map(before.map((row) => [row.workerId, row]))
  return workers.map((worker): WorkerRow => {
    const old = known.get(worker.workerId ?? '')
    return {
      workerId: worker.workerId ?? '',
      host: worker.host ?? '',
      device: worker.device ?? '',
      state: worker.state ?? '',
      tokensPerSecond: worker.tokensPerSecond || (old?.tokensPerSecond ?? 0),
      share: worker.share || (old?.share ?? 0),
      memoryBytes: worker.memoryBytes ?? 0,
      doing: doingOf(worker),
    }
  })
}

/**
 * A job's workers as they are now: its events end with it, the fleet goes on. What the coordinator
 * does not list is gone; one that has taken up another job is elsewhere.
 */
export function workersNow(view: JobView, live: readonly FeedWorker[] | null): WorkerRow[] {
  if (live === null) return view.workers
  const byId = new Map(live.map((worker) => [worker.workerId ?? '', worker]))
  return view.workers.map((row) => {
    const worker = byId.get(row.workerId)
    if (worker === undefined) return { ...row, state: 'gone', doing: '' }
    const isElsewhere = Boolean(worker.jobId) && worker.jobId !== view.jobId
    const state = isElsewhere ? 'elsewhere' : worker.state || row.state
    const memoryBytes = worker.memoryBytes || row.memoryBytes
    return { ...row, state, memoryBytes, doing: doingOf(worker) }
  })
}

const doingOf = ({ doing, state }: FeedWorker): string =>
  !doing || doing === state || ['idle', 'preparing', 'training'].includes(doing) ? '' : doing

const unknownWorker = (workerId: string): WorkerRow => ({
  workerId,
  host: '',
  device: '',
  state: 'training',
  tokensPerSecond: 0,
  share: 0,
  memoryBytes: 0,
  doing: '',
})

/** JSON has no NaN: it arrives as null or as text, and is a hole in the curve. */
function finite(value: unknown): number | null {
  return typeof value === 'number' && Number.isFinite(value) ? value : null
}

export const isFinal = (state: JobState): boolean =>
  state === 'SUCCEEDED' || state === 'FAILED' || state === 'STOPPED'

/**
 * Time left now: the last estimate less what has passed since; null when nothing is left to wait
 * for.
 */
export function timeLeftMs(view: JobView, nowMs: number): number | null {
  const isUnderWay = view.points.length > 0 && view.step < view.numSteps
  if (view.state !== 'RUNNING' || !isUnderWay) return null
  return Math.max(0, view.etaMs - (nowMs - view.etaAtMs))
}
