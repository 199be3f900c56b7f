/** A coordinator's run machine with a log that answers at once: tests say what workers say. */
import {
  defaultRunLimits,
  type RunConfig,
  type RunEvent,
  type RunOutcome,
} from '../../coordinator/run-events.js'
import { RunMachine } from '../../coordinator/run-machine.js'
import type { CommitLogRecord, LoggedRecord } from '../../proto/commit-record.js'
import type { FromWorker, FromWorker__Output } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { JobEvent } from '../../proto/gen/tunemesh/v1/JobEvent.js'
import type { ToWorker } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { WorkerService } from '../../proto/services.js'

const wire = WorkerService.service.Attach
const planHash = 'plan'

export interface FixtureOptions {
  microBatchesPerStep?: number
  numSteps?: number
  numSlices?: number
  config?: Partial<RunConfig>
}

interface AttachedState {
  appliedStep?: number
  appliedSequence?: number
  precisions?: string[]
  /** The same over restarts; by default the id. */
  identity?: string
  /** Told by Prepared; by default that of Hello. */
  deviceClass?: string
}

export class RunFixture {
  readonly machine: RunMachine
  readonly log: LoggedRecord[] = []
  readonly sent: { workerId: string; message: ToWorker }[] = []
  readonly events: JobEvent[] = []
  readonly disconnected: string[] = []
  outcome: RunOutcome | null = null
  nowMs = 0
  /** Appends of this kind stand in the log, but their acknowledgement does not come. */
  silentKind: CommitLogRecord['kind'] | null = null

  constructor(private readonly options: FixtureOptions = {}) {
    this.machine = new RunMachine(configFor(options))
    this.advance({ kind: 'started', log: [] })
  }

  get run() {
    return this.machine.run
  }

  advance(event: RunEvent): void {
    for (const effect of this.machine.advance(event, this.nowMs)) {
      if (effect.kind === 'send') this.sent.push(effect)
      else if (effect.kind === 'event') this.events.push(effect.event)
      else if (effect.kind === 'disconnect') this.disconnected.push(effect.workerId)
      else if (effect.kind === 'finish') this.outcome = effect.outcome
      else if (effect.kind === 'append') this.#append(effect.record)
    }
  }

  #append(record: CommitLogRecord): void {
    const sequence = this.log.length + 1
    this.log.push({ sequence, record })
    if (record.kind !== this.silentKind) this.advance({ kind: 'appendAcknowledged', sequence })
  }

  /** The acknowledgement that was held back. */
  acknowledge(): void {
    this.silentKind = null
    this.advance({ kind: 'appendAcknowledged', sequence: this.log.length })
  }

  /** Attached and prepared, holding nothing unless told. */
  attach(workerId: string, state: AttachedState = {}): void {
    const { precisions = ['fp32'], identity = workerId, ...held } = state
    const described = { deviceClass: 'cpu', host: 'host', device: 'cpu' }
    const worker = { workerId, identity, ...described, precisions }
    this.advance({ kind: 'workerAttached', worker })
    const numBlocks = this.options.numSlices ?? 4
    this.say(workerId, { prepared: { jobId: 'job', planHash, numBlocks, ...held } })
  }

  say(workerId: string, message: FromWorker): void {
    const received = wire.requestDeserialize(wire.requestSerialize(message)) as FromWorker__Output
    this.advance({ kind: 'message', workerId, message: received })
  }

  tick(afterMs: number): void {
    this.nowMs += afterMs
    this.advance({ kind: 'tick' })
  }

  lose(workerId: string): void {
    this.advance({ kind: 'workerLost', workerId, reason: 'its stream broke' })
  }

  /** What was sent to a worker under this name, oldest first. */
  toWorker<Kind extends keyof ToWorker>(workerId: string, kind: Kind) {
    return this.sent.flatMap((sent) => {
      const body = sent.workerId === workerId ? sent.message[kind] : null
      return body ? [body as NonNullable<ToWorker[Kind]>] : []
    })
  }

  /** The newest one of the step. */
  plan(workerId: string, step: number) {
    return this.toWorker(workerId, 'stepPlan').findLast((plan) => plan.step === step)
  }

  plannedThrough(workerId: string): number {
    return Math.max(...this.toWorker(workerId, 'stepPlan').map(({ step = 0 }) => step))
  }

  key(step: number) {
    return { jobId: 'job', fleetEpoch: this.run.log.fleetEpoch, step }
  }

  /** Digest of any contribution's slice is 1, so a sum's is the number of its leases. */
  leaseDone(workerId: string, step: number, lease: number, leaseAttempt = 1): void {
    const microBatches = this.run.steps.get(step)?.leases[lease]?.microBatches ?? []
    const losses = microBatches.map((microBatch) => ({ microBatch, lossSum: 1, numTokens: 8 }))
    const digests = this.#slices().map((slice) => ({ slice, digest: hex(1) }))
    const done = { lease, leaseAttempt, losses, digests, computeMs: 10 }
    this.say(workerId, { leaseDone: { ...this.key(step), ...done } })
  }

  leaseDelivered(workerId: string, step: number, lease: number): void {
    const slices = this.#slices().map((slice) => ({ slice, sliceAttempt: 1 }))
    const delivered = { lease, leaseAttempt: 1, slices }
    this.say(workerId, { leaseDelivered: { ...this.key(step), ...delivered } })
  }

  /** By whoever owns the slice now, from first attempts. */
  sliceDone(step: number, slice: number): void {
    const stepRun = this.run.steps.get(step)
    const { workerId = '', sliceAttempt = 0 } = stepRun?.slices[slice] ?? {}
    const counted = (stepRun?.leases ?? []).map(({ lease }) => ({ lease, leaseAttempt: 1 }))
    const sums = { sumDigest: hex(counted.length), publishedDigest: hex(slice), sumSquares: 1 }
    const done = { slice, sliceAttempt, counted, ...sums }
    this.say(workerId, { sliceDone: { ...this.key(step), ...done } })
  }

  /** Everything that a step takes until its commit is appended. */
  compute(step: number): void {
    const leases = [...(this.run.steps.get(step)?.leases ?? [])]
    leases.forEach(({ attempts }, lease) => {
      this.leaseDone(attempts[0]?.workerId ?? '', step, lease)
    })
    for (const slice of this.#slices()) this.sliceDone(step, slice)
  }

  /** Computes, commits and applies what is planned, and no more. */
  finishPlanned(workerIds: readonly string[]): void {
    const last = this.run.plannedThrough
    for (let step = this.run.log.committedStep + 1; step <= last; step++) {
      this.compute(step)
      for (const workerId of workerIds) this.applied(workerId, step)
    }
  }

  applied(workerId: string, step: number, streamSequence = this.sequenceOf(step)): void {
    this.say(workerId, { applied: { jobId: 'job', step, streamSequence } })
  }

  sequenceOf(step: number): number {
    const isOf = ({ record }: LoggedRecord) =>
      (record.kind === 'commit' || record.kind === 'skip') && record.step === step
    return this.log.findLast(isOf)?.sequence ?? 0
  }

  kinds(): string[] {
    return this.log.map(({ record }) => record.kind)
  }

  #slices = () => Array.from({ length: this.options.numSlices ?? 4 }, (_, slice) => slice)
}

const hex = (value: number) => value.toString(16).padStart(16, '0')

function configFor(options: FixtureOptions): RunConfig {
  const { microBatchesPerStep = 4, numSteps = 20 } = options
  const numPacks = microBatchesPerStep * numSteps
  return {
    jobId: 'job',
    coordinatorId: 'c1',
    dataOrder: {
      seed: 1,
      numPacks,
      packsPerMicroBatch: 1,
      microBatchesPerStep,
      numEpochs: 1,
      maxSteps: null,
      explicitOrder: null,
    },
    targetsPerPack: Array.from({ length: numPacks }, () => 1),
    tokensPerPack: Array.from({ length: numPacks }, () => 8),
    learningRates: Array.from({ length: numSteps }, (_, index) => 1 / (index + 1)),
    beta1: 0.9,
    beta2: 0.999,
    maxGradNorm: 1,
    onNonFinite: 'stop',
    checkpointEverySteps: 0,
    evaluateEverySteps: 0,
    evaluateOnStart: false,
    evaluationSplits: [],
    prepare: { jobId: 'job', sliceBlocks: 1, chunkBlocks: 1, trainSpecJson: '{}' },
    outputDir: 'out',
    baseModelName: 'base',
    precision: 'fp32',
    isDeterministic: true,
    wantedWorkers: 1,
    limits: defaultRunLimits,
    ...options.config,
  }
}
