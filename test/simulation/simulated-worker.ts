/** A worker process: the real run machine in a toy shell, with crashes and pauses. */
import type { FromWorker } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { WorkerRunMachine } from '../../worker/run-machine.js'
import type { SimulatedStream } from './simulated-network.js'
import { SimulatedProcess } from './simulated-process.js'
import { ToyDataPlane } from './toy-data-plane.js'
import * as toy from './toy-engine.js'
import type { World } from './world.js'

type ComputeMicroBatch = Extract<WorkerEffect, { kind: 'computeMicroBatch' }>

const tickMs = 100
const mostSlots = 8

export type WorkerStream = SimulatedStream<FromWorker, ToWorker__Output>

export class SimulatedWorker extends SimulatedProcess {
  /** Given by the coordinator; kept over lost streams. */
  workerId = ''
  stream: WorkerStream | null = null
  weights: toy.ToyWeights
  readonly machine: WorkerRunMachine
  readonly dataPlane: ToyDataPlane
  readonly #slots: (bigint[] | null)[]
  readonly #engineQueue: { durationMs: number; effect: WorkerEffect }[] = []
  #isEngineBusy = false
  #isPrepared = false

  constructor(
    private readonly world: World,
    readonly deviceClass: string,
    readonly slowness: number,
    /** Kept by the process that takes its place. */
    readonly identity: string,
  ) {
    super(world.clock)
    const { numContributionSlots, numSlices } = world.options
    this.machine = new WorkerRunMachine({
      workerId: '',
      numContributionSlots,
      doubtAfterMs: 400,
      requestSumEveryMs: 50,
    })
    this.#slots = Array.from({ length: numContributionSlots }, () => null)
    this.weights = toy.startWeights(numSlices)
    this.dataPlane = new ToyDataPlane({
      workerId: () => this.workerId,
      publish: (frame) => world.publish(frame),
      event: (event) => this.advance(event),
      after: (delayMs, run) => this.after(delayMs, run),
      contribution: (slot, slice) => this.#slots[slot]?.[slice] ?? 0n,
    })
    this.every(tickMs, () => {
      this.advance({ kind: 'tick' })
      this.#sendUp({ heartbeat: {} })
    })
  }

  override crash(): void {
    super.crash()
    this.stream?.break()
  }

  attached(workerId: string): void {
    this.workerId = workerId
    this.advance({ kind: 'attached', workerId })
  }

  detached(): void {
    this.stream = null
    this.advance({ kind: 'detached' })
    this.after(this.world.random.between(20, 150), () => this.world.attach(this))
  }

  advance(event: WorkerEvent): void {
    if (!this.isAlive) return
    const effects = this.machine.advance(
      this.world.mutateWorkerEvent(event),
      this.world.clock.nowMs,
    )
    for (const effect of effects) this.#perform(this.world.mutateWorkerEffect(effect))
    this.world.checkWorkerBounds(this)
  }

  #sendUp(message: FromWorker): void {
    this.stream?.sendUp(message)
  }

  #perform(effect: WorkerEffect): void {
    const { dataPlane, world } = this
    switch (effect.kind) {
      case 'send':
        return this.#sendUp(effect.message)
      case 'openEpoch':
        return dataPlane.openEpoch(effect)
      case 'acceptSums':
        return dataPlane.acceptSums(effect.steps)
      case 'openSlice':
        return dataPlane.openSlice(effect)
      case 'closeSlice':
        return dataPlane.closeSlice(effect)
      case 'sendContribution':
        return dataPlane.sendContribution(effect)
      case 'cancelContribution':
        return dataPlane.cancelContribution(effect)
      case 'countContribution':
        return dataPlane.count(effect)
      case 'dropContribution':
        return dataPlane.drop(effect)
      case 'finishSlice':
        return this.after(world.random.between(0, 1), () => this.#finishSlice(effect))
      case 'publishSum':
        return dataPlane.publishSum(effect)
      case 'sendSum':
        return dataPlane.sendSum(effect)
      case 'refuseSum':
        return dataPlane.refuseSum(effect)
      case 'requestSum':
        return dataPlane.requestSum(effect)
      case 'readCommitLog':
        return world.jetStream.read((log) =>
          this.guard(() =>
            this.advance(
              log
                ? {
                    kind: 'commitLogRead',
                    records: log.filter(({ sequence }) => sequence > effect.afterSequence),
                  }
                : { kind: 'commitLogUnreadable', reason: 'nats-server is away' },
            ),
          ),
        )
      case 'exit':
        world.workerExits(this)
        return
      case 'restart':
        // What was said has gone out by then.
        this.after(20, () => world.workerRestarts(this))
        return
      case 'log':
        return
      default:
        return this.#queue(effect)
    }
  }

  // ---- the engine: one operation after another ----

  #queue(effect: Exclude<WorkerEffect, { kind: 'send' }>): void {
    const { random } = this.world
    const isLong = ['computeMicroBatch', 'probe', 'loadState', 'evaluate'].includes(effect.kind)
    this.#engineQueue.push({
      durationMs: isLong ? random.between(3, 15) * this.slowness : random.between(0, 1),
      effect,
    })
    this.#runNext()
  }

  #runNext(): void {
    if (this.#isEngineBusy) return
    const next = this.#engineQueue.shift()
    if (!next) return
    const { durationMs, effect } = next
    this.#isEngineBusy = true
    if (effect.kind === 'computeMicroBatch') this.#backward(effect, durationMs)
    this.after(durationMs, () => {
      this.#isEngineBusy = false
      this.#runEngine(effect)
      this.#runNext()
    })
  }

  #runEngine(effect: WorkerEffect): void {
    const { world } = this
    switch (effect.kind) {
      case 'prepareEngine':
        this.weights = toy.startWeights(world.options.numSlices)
        this.#isPrepared = true
        return this.advance({
          kind: 'enginePrepared',
          planHash: 'plan',
          memory: { totalBytes: 0, uses: [] },
          numBlocks: world.options.numSlices,
          numTrainedParameters: world.options.numSlices,
          weightsSha256: toy.weightsDigest(this.weights),
          deviceClass: this.deviceClass,
        })
      case 'releaseJob':
        this.dataPlane.clear()
        this.#isPrepared = false
        return
      case 'clearContribution':
        this.#slots[effect.slot] = world.emptyContribution()
        return
      case 'computeMicroBatch':
        return this.#compute(effect)
      case 'applyUpdate':
        return this.#apply(effect)
      case 'uploadState':
        return this.#upload(effect)
      case 'loadState':
        return this.#load(effect)
      case 'probe': {
        const value = toy.gradient(this.weights, effect.packs, this.#bits())
        const digest = value.map(toy.linearDigest).join('').slice(0, 16)
        const { step, microBatch } = effect
        return this.advance({ kind: 'probeDone', step, microBatch, digest })
      }
      case 'evaluate': {
        const { step, split } = effect.evaluate
        return this.advance({ kind: 'evaluated', step, split, lossSum: 1, numTargetTokens: 1 })
      }
      case 'deliver':
        return this.advance({
          kind: 'delivered',
          delivered: { weightsSha256: toy.weightsDigest(this.weights), artifacts: [] },
        })
    }
  }

  /** What the next computation's bits depend on. */
  #bits(): string {
    const { options } = this.world
    return options.isFree ? `${this.deviceClass} ${this.world.random.next()}` : this.deviceClass
  }

  /** Slice by slice, the last one first; in the lease's last micro-batch each is told at once. */
  #backward(effect: ComputeMicroBatch, durationMs: number): void {
    const { kind: _, packs, lossDivisor: __, isLast, microBatch: ___, isChecked, ...key } = effect
    const value = toy.gradient(this.weights, packs, this.#bits())
    const isBroken = this.#isNonFinite(effect) || this.#hasFault({ ...effect, isChecked })
    const numFinite = isBroken ? Math.floor(value.length / 2) : value.length
    for (let done = 0; done < numFinite; done++) {
      this.after((durationMs * (done + 1)) / (value.length + 1), () => {
        const slice = value.length - 1 - done
        const slot = this.#slots[key.slot]
        if (!slot) throw new Error('a micro-batch without a cleared slot')
        slot[slice] = toy.addWrapped(slot[slice] ?? 0n, value[slice] as bigint)
        const digest = toy.linearDigest(slot[slice], slice)
        if (isLast) this.advance({ kind: 'sliceReady', ...key, slice, digest })
      })
    }
  }

  #isNonFinite({ step, microBatch }: ComputeMicroBatch): boolean {
    const { nonFinite } = this.world.options
    return nonFinite?.step === step && nonFinite.microBatch === microBatch
  }

  #hasFault({ step, microBatch, isChecked }: ComputeMicroBatch): boolean {
    const { deviceFault } = this.world.options
    return deviceFault?.step === step && deviceFault.microBatch === microBatch && !isChecked
  }

  #compute(effect: ComputeMicroBatch): void {
    const { kind: _, packs, lossDivisor: __, isLast: ___, ...rest } = effect
    if (this.#hasFault(effect)) {
      const error = { code: 'DEVICE_FAILED', message: 'Xid', details: [] }
      return this.advance({ kind: 'microBatchFailed', ...rest, error, tensor: '' })
    }
    if (this.#isNonFinite(effect)) {
      return this.advance({
        kind: 'microBatchFailed',
        ...rest,
        error: { code: 'NON_FINITE_GRADIENT', message: 'NaN', details: [] },
        tensor: 'model.embed_tokens.weight',
      })
    }
    this.advance({
      kind: 'microBatchDone',
      ...rest,
      lossSum: toy.lossSum(packs),
      numTargetTokens: packs.length,
      numTokens: packs.length,
      computeMs: 5 * this.slowness,
    })
  }

  /** On the exchange's thread: beside the engine's queue. */
  #finishSlice({ kind: _, ...key }: Extract<WorkerEffect, { kind: 'finishSlice' }>): void {
    const sum = this.dataPlane.accumulated(key)
    if (sum === null) return
    const value = toy.published(sum)
    this.dataPlane.holdOwnSum(key, value)
    this.advance({
      kind: 'sliceFinished',
      ...key,
      sumDigest: toy.linearDigest(sum, key.slice),
      publishedDigest: toy.publishedDigest(value, key.slice),
      sumSquares: toy.sumSquares(value),
    })
  }

  #apply({ step, update }: Extract<WorkerEffect, { kind: 'applyUpdate' }>): void {
    const slot = this.dataPlane.sums[step % 2]
    const gradients = this.weights.slices.map((_, slice) => {
      const held = slot?.get(slice)
      if (held?.step !== step) throw new Error(`worker applies step ${step} without slice ${slice}`)
      return held.value
    })
    this.weights = toy.applyUpdate(this.weights, gradients, update)
    const weightsSha256 = toy.weightsDigest(this.weights)
    this.world.checkApplied(this, step, gradients)
    this.advance({ kind: 'updateApplied', step, weightsSha256, applyMs: 1 })
  }

  #upload({ step, purpose }: Extract<WorkerEffect, { kind: 'uploadState' }>): void {
    const state = structuredClone(this.weights)
    this.after(this.world.random.between(5, 60), () => {
      if (this.world.random.chance(this.world.uploadFailure)) {
        return this.advance({
          kind: 'engineFailed',
          operation: 'uploadState',
          step,
          error: { code: 'COORDINATOR_UNREACHABLE', message: 'broken', details: [] },
        })
      }
      const weightsSha256 = toy.weightsDigest(state)
      const digest = `sha256:${weightsSha256}`
      this.world.blobs.set(digest, state)
      this.advance({ kind: 'stateUploaded', step, purpose, digest, sizeBytes: 8, weightsSha256 })
    })
  }

  #load({ step, digest, sequence }: Extract<WorkerEffect, { kind: 'loadState' }>): void {
    const state = this.world.blobs.get(digest)
    if (!state) throw new Error(`no blob ${digest}`)
    if (!this.#isPrepared) return
    this.weights = structuredClone(state)
    this.advance({
      kind: 'stateLoaded',
      step,
      sequence,
      weightsSha256: toy.weightsDigest(this.weights),
    })
  }

  assertBounds(fail: (what: string) => void): void {
    const { run } = this.machine
    if (run.plans.size > 3) fail(`worker keeps ${run.plans.size} plans`)
    if (run.commits.size > 2) fail(`worker keeps ${run.commits.size} commits`)
    if (run.sums.size > 4) fail(`worker keeps sums of ${run.sums.size} steps`)
    if (run.slots.length > mostSlots) fail('worker grew its slots')
    if (this.#engineQueue.length > 200) fail(`engine queue of ${this.#engineQueue.length}`)
    if (this.dataPlane.numStaged > 64) fail('too much staged')
  }
}
