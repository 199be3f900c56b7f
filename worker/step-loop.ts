/**
 * The worker's main path. One job: what the coordinator says, what the engine answers and what the
 * data plane brings become events of the run machine (worker/run-machine.ts), which decides; its
 * effects are carried out here, in order.
 *
 *   StepPlan → computeMicroBatch … → sliceReady … → sendContribution to each slice's owner, while
 *            backward goes on → LeaseDone
 *            → as owner: countContribution … → finishSlice → publishSum → (coordinator commits)
 *   Commit   → every sum is here and verified → applyUpdate → Applied → next StepPlan
 */

import type { LoggedRecord } from '../proto/commit-record.js'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import { failpoint, faultpoint } from '../proto/failpoint.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { Prepare__Output } from '../proto/gen/tunemesh/v1/Prepare.js'
import type { DataPlane } from './data-plane.js'
import type { DeviceOptions } from './device.js'
import { JobEngine } from './job-engine.js'
import type { JobFiles } from './job-files.js'
import type { WorkerEffect, WorkerEvent } from './run-events.js'
import type { WorkerRunMachine } from './run-machine.js'
import { leaseKey } from './run-state.js'

export interface StepLoopOptions {
  machine: WorkerRunMachine
  files: JobFiles
  device: DeviceOptions
  nowMs: () => number
  /** Resolves when no other model is loaded: a job's memory is planned without one. */
  freeMemory(): Promise<void>
  send(message: FromWorker): void
  /** Rejects where gradients would find no way: before a large model is fetched for nothing. */
  assertReachable(): Promise<void>
  openDataPlane(job: JobEngine, onEvent: (event: WorkerEvent) => void): Promise<DataPlane>
  readCommitLog(jobId: string, afterSequence: number): Promise<LoggedRecord[]>
  log(level: 'info' | 'warn' | 'error', message: string): void
  /** The machine asked this process to end. */
  onExit(reason: string): void
  /** Likewise, and another to take its place: the device has failed. */
  onDeviceFailure(reason: string): void
}

export class StepLoop {
  #job: JobEngine | null = null
  #dataPlane: DataPlane | null = null
  #preparing = new AbortController()
  /**
   * Engine operations run in the order they were asked for, each after the one before has answered.
   */
  #engineTail: Promise<void> = Promise.resolve()
  readonly #tick: NodeJS.Timeout

  constructor(private readonly options: StepLoopOptions) {
    this.#tick = setInterval(() => this.handle({ kind: 'tick' }), 200)
  }

  handle(event: WorkerEvent): void {
    for (const effect of this.options.machine.advance(event, this.options.nowMs())) {
      this.#carryOut(effect)
    }
  }

  /** Nothing of a job stands on the device yet: a worker that leaves now takes nothing along. */
  get isEmpty(): boolean {
    return this.#job === null
  }

  async close(): Promise<void> {
    clearInterval(this.#tick)
    this.#endPreparing()
    this.#enqueue('release', 0, () => this.#release())
    await this.#engineTail
  }

  #carryOut(effect: WorkerEffect): void {
    switch (effect.kind) {
      case 'send':
        if (effect.message.leaseDelivered) failpoint('worker.after-lease-done')
        return this.options.send(effect.message)
      case 'log':
        return this.options.log(effect.level, effect.message)
      case 'exit':
        return this.options.onExit(effect.reason)
      case 'restart':
        return this.options.onDeviceFailure(effect.reason)
      case 'readCommitLog':
        return this.#readCommitLog(effect.afterSequence)
      case 'prepareEngine':
        return this.#beginPreparing(effect.prepare)
      case 'releaseJob':
        this.#endPreparing()
        return this.#enqueue('release', 0, () => this.#release())
      case 'clearContribution':
      case 'computeMicroBatch':
      case 'applyUpdate':
      case 'uploadState':
      case 'loadState':
      case 'probe':
      case 'evaluate':
      case 'deliver':
        return this.#runOnEngine(effect)
      default:
        this.#dataPlane?.carryOut(effect)
    }
  }

  #runOnEngine(effect: EngineEffect): void {
    if (effect.kind === 'computeMicroBatch') return this.#computeMicroBatch(effect)
    const step = 'step' in effect ? effect.step : 0
    this.#enqueue(effect.kind, step, async () => {
      const job = this.#needJob()
      const answer = await engineOperations[effect.kind](job, effect as never, this.#dataPlane)
      if (answer) this.handle(answer)
    })
  }

  /**
   * A gradient that fails is the step's news, not the engine's end: the slot stays void, the
   * machine decides. So it does where the device fails, which says nothing of what caused it.
   */
  #computeMicroBatch(effect: Extract<WorkerEffect, { kind: 'computeMicroBatch' }>): void {
    this.#enqueue('computeMicroBatch', effect.step, async () => {
      const { kind: _, packs, lossDivisor, isLast, isChecked, ...key } = effect
      const job = this.#needJob()
      try {
        provokeFault(isChecked)
        const { notes, ...result } = isLast
          ? await this.#lastMicroBatch(job, effect)
          : await job.microBatch(packs, lossDivisor, {
              slot: effect.slot,
              isChecked,
              moreFollows: true,
            })
        for (const note of notes) this.options.log('warn', note)
        const numTokens = job.numTokens(packs)
        this.handle({ kind: 'microBatchDone', ...key, ...result, numTokens })
      } catch (error) {
        if (!(error instanceof TunemeshError) || !microBatchCodes.has(error.code)) throw error
        const tensor = gradientCodes.has(error.code) ? (error.details[0] ?? '') : ''
        const info = { code: error.code, message: error.message }
        this.handle({ kind: 'microBatchFailed', ...key, isChecked, error: info, tensor })
      }
    })
  }

  /** Slices go to their owners as soon as they stand, while the engine is at work on the others. */
  async #lastMicroBatch(job: JobEngine, effect: EffectOf<'computeMicroBatch'>) {
    const { packs, lossDivisor, slot, isChecked, ...rest } = effect
    const key = leaseKey(rest)
    const result = await job.lastMicroBatch(packs, lossDivisor, {
      slot,
      isChecked,
      onSlice: ({ slice, digest }) =>
        this.handle({ kind: 'sliceReady', ...key, slot, slice, digest }),
    })
    failpoint('worker.before-lease-done')
    return result
  }

  #enqueue(operation: string, step: number, run: () => Promise<void>): void {
    this.#engineTail = this.#engineTail.then(run).catch((cause: unknown) => {
      const message = cause instanceof Error ? cause.message : String(cause)
      const code = isErrorCode((cause as { code?: unknown }).code)
        ? (cause as TunemeshError).code
        : 'ENGINE_FAILED'
      this.options.log('error', `${operation} failed: ${message}`)
      this.handle({ kind: 'engineFailed', operation, step, error: { code, message } })
    })
  }

  /** A sum that stands here travels to the device while others are awaited. */
  #fetchSum(job: JobEngine, event: WorkerEvent): void {
    if (event.kind !== 'sliceFinished' && event.kind !== 'sumArrived') return
    const { step, slice } = event
    this.#enqueue('fetchSum', step, async () => {
      if (this.#job === job) await job.fetchSum(step, slice)
    })
  }

  #beginPreparing(prepare: Prepare__Output): void {
    const { signal } = this.#preparing
    this.#enqueue('prepare', 0, () =>
      this.#prepare(prepare, signal).catch((error: unknown) => {
        // Given up on purpose: whatever broke on the way is nobody's news.
        if (!signal.aborted) throw error
      }),
    )
  }

  /** The job is released, or the worker ends: what is still being fetched for it is not wanted. */
  #endPreparing(): void {
    this.#preparing.abort()
    this.#preparing = new AbortController()
    this.options.files.abort()
  }

  async #prepare(prepare: Prepare__Output, signal: AbortSignal): Promise<void> {
    await this.#release()
    await this.options.freeMemory()
    signal.throwIfAborted()
    await this.options.assertReachable()
    const job = await JobEngine.open(prepare, this.options.files, this.options.device)
    this.#job = job
    signal.throwIfAborted()
    this.#dataPlane = await this.options.openDataPlane(job, (event) => {
      this.#fetchSum(job, event)
      this.handle(event)
    })
    const { memory, planHash, weightsSha256 } = job.ready
    const { deviceClass } = job.engine
    this.handle({
      kind: 'enginePrepared',
      planHash,
      memory: { totalBytes: memory.totalBytes, uses: memory.uses, layers: memory.layers },
      numBlocks: memory.numBlocks,
      numTrainedParameters: memory.numTrainedParameters,
      weightsSha256,
      deviceClass,
    })
  }

  async #release(): Promise<void> {
    await this.#dataPlane?.close()
    this.#dataPlane = null
    await this.#job?.close()
    this.#job = null
  }

  #needJob(): JobEngine {
    if (this.#job) return this.#job
    throw new TunemeshError('INTERNAL', 'The engine was asked for work before a job was prepared.')
  }

  #readCommitLog(afterSequence: number): void {
    const jobId = this.#job?.prepare.jobId ?? ''
    this.options.readCommitLog(jobId, afterSequence).then(
      (records) => this.handle({ kind: 'commitLogRead', records }),
      (error: unknown) => this.handle({ kind: 'commitLogUnreadable', reason: String(error) }),
    )
  }
}

type EngineKind =
  | 'clearContribution'
  | 'applyUpdate'
  | 'uploadState'
  | 'loadState'
  | 'probe'
  | 'evaluate'
  | 'deliver'
type EffectOf<Kind extends WorkerEffect['kind']> = Extract<WorkerEffect, { kind: Kind }>
type EngineEffect = EffectOf<EngineKind | 'computeMicroBatch'>
type EngineOperation<Kind extends EngineKind> = (
  job: JobEngine,
  effect: EffectOf<Kind>,
  dataPlane: DataPlane | null,
) => Promise<WorkerEvent | null>

const gradientCodes = new Set(['NON_FINITE_GRADIENT', 'GRADIENT_OUT_OF_RANGE'])
const microBatchCodes = new Set([...gradientCodes, 'DEVICE_FAILED'])

/** As a card would fail, for tests without one. */
function provokeFault(isChecked: boolean): void {
  const isDue = isChecked
    ? faultpoint('worker.device-error-again')
    : faultpoint('worker.device-error')
  if (!isDue) return
  const operation = isChecked ? 'linear_forward' : 'copy_out'
  throw new TunemeshError('DEVICE_FAILED', `${operation} failed: an error provoked by a test.`)
}

const engineOperations: { [Kind in EngineKind]: EngineOperation<Kind> } = {
  async clearContribution(job, { slot }) {
    await job.exchange.clearSlot(slot)
    return null
  },

  async applyUpdate(job, { step, update }) {
    const startMs = performance.now()
    failpoint('worker.before-apply')
    await job.engine.applyUpdate(step, update)
    failpoint('worker.after-apply')
    const weightsSha256 = job.isDigestStep(step) ? await job.engine.weightsDigest() : ''
    return { kind: 'updateApplied', step, weightsSha256, applyMs: performance.now() - startMs }
  },

  async uploadState(job, { step, purpose }) {
    failpoint('worker.before-upload')
    const { digest, sizeBytes, weightsSha256 } = await job.uploadState(step)
    failpoint('worker.after-upload')
    return { kind: 'stateUploaded', step, purpose, digest, sizeBytes, weightsSha256 }
  },

  async loadState(job, { step, digest, sequence }) {
    const { weightsSha256 } = await job.loadState(digest)
    return { kind: 'stateLoaded', step, sequence, weightsSha256 }
  },

  async probe(job, { step, slot, microBatch, packs, lossDivisor }) {
    const digest = await job.probe(packs, lossDivisor, slot)
    return { kind: 'probeDone', step, microBatch, digest }
  },

  async evaluate(job, { evaluate }) {
    const { lossSum, numTargetTokens } = await job.evaluate(evaluate.split)
    const { step, split } = evaluate
    return { kind: 'evaluated', step, split, lossSum, numTargetTokens }
  },

  async deliver(job, { deliver }) {
    failpoint('worker.before-deliver')
    const delivered = await job.deliver(deliver)
    failpoint('worker.after-deliver')
    return { kind: 'delivered', delivered }
  },
}
