/** DESIGN §4 as assertions on a simulated run. */
import { isDeepStrictEqual } from 'node:util'
import type { RunOutcome } from '../../coordinator/run-events.js'
import {
  type CommitRecord,
  decodeRecord,
  encodeRecord,
  type LoggedRecord,
} from '../../proto/commit-record.js'
import { referenceRun } from './reference-run.js'
import type { SimulatedWorker } from './simulated-worker.js'
import * as toy from './toy-engine.js'
import type { World } from './world.js'

class InvariantViolated extends Error {
  override readonly name = 'InvariantViolated'
}

export class Invariants {
  readonly reference
  /** What the log says now; rollbacks take steps away. */
  readonly committed = new Map<number, CommitRecord | null>()
  /** What it said before; a worker may still apply it, if it was told while it was true. */
  readonly #rolledBack: CommitRecord[] = []
  /** What is computed again has the same bits. */
  readonly #repeats: boolean
  #fleetEpoch = 0
  #epochOwner = ''
  #committedStep = 0

  constructor(private readonly world: World) {
    const { deviceClasses, isFree } = world.options
    this.#repeats = deviceClasses.length === 1 && !isFree
    this.reference = referenceRun(world.options)
  }

  violated(what: string): never {
    throw new InvariantViolated(what)
  }

  recordAppended({ record }: LoggedRecord): void {
    if (!isDeepStrictEqual(decodeRecord(encodeRecord(record)), record)) {
      this.violated('a record does not survive encoding')
    }
    if (record.kind === 'epoch') {
      if (record.fleetEpoch <= this.#fleetEpoch) this.violated(`epoch ${record.fleetEpoch} twice`)
      this.#fleetEpoch = record.fleetEpoch
      this.#epochOwner = record.coordinatorId
    } else if (record.coordinatorId !== this.#epochOwner) {
      this.violated(`${record.kind} by ${record.coordinatorId}, fenced by ${this.#epochOwner}`)
    }
    if (record.kind === 'commit' || record.kind === 'skip') this.#recordStep(record)
    if (record.kind === 'rollback') {
      if (this.#repeats) this.violated('rollback in one class')
      for (const [step, gone] of this.committed) {
        if (step <= record.toStep) continue
        this.committed.delete(step)
        if (gone) this.#rolledBack.push(gone)
      }
      this.#committedStep = record.toStep
    }
    if (record.kind === 'checkpoint' && record.step > this.#committedStep) {
      this.violated(`I4 checkpoint of step ${record.step}, committed is ${this.#committedStep}`)
    }
  }

  #recordStep(record: Extract<LoggedRecord['record'], { kind: 'commit' | 'skip' }>): void {
    if (record.step !== this.#committedStep + 1) {
      this.violated(`I1 step ${record.step} committed after step ${this.#committedStep}`)
    }
    this.#committedStep = record.step
    this.committed.set(record.step, record.kind === 'commit' ? record : null)
    if (record.kind !== 'commit') return
    const microBatches = record.leases.flatMap((lease) => lease.microBatches).sort((a, b) => a - b)
    const isPartition = microBatches.every((microBatch, index) => microBatch === index)
    if (!isPartition || microBatches.length === 0) {
      this.violated(`I1 step ${record.step} counts micro-batches ${microBatches}`)
    }
    if (!this.#repeats) return
    const expected = this.reference.published[record.step]
    for (const { slice, publishedDigest } of record.slices) {
      if (publishedDigest !== expected?.[slice]) {
        this.violated(`I1 step ${record.step} slice ${slice} is not the sum of its micro-batches`)
      }
    }
  }

  /** Commit, then apply: what a worker applies stands in the log, bit for bit. */
  checkApplied(worker: SimulatedWorker, step: number, gradients: bigint[]): void {
    const record = this.committed.get(step)
    const differing = record ? differingSlice(record, gradients) : null
    if (differing === -1) return this.#checkWeights(worker, step)
    // Announced before it was rolled back, and late to a sleeper: it must load another state later.
    const stale = this.#rolledBack.filter((gone) => gone.step === step)
    if (stale.some((gone) => differingSlice(gone, gradients) === -1)) return
    if (!record) this.violated(`I4 ${worker.workerId} applied step ${step}, which the log lacks`)
    this.violated(`I2 ${worker.workerId} applied another sum for step ${step} slice ${differing}`)
  }

  #checkWeights(worker: SimulatedWorker, step: number): void {
    if (!this.#repeats) return
    // A skipped step leaves the weights, its number moves on with the next update.
    const digest = toy.weightsDigest(worker.weights)
    if (digest !== this.reference.digests[step]) {
      this.violated(`I2 ${worker.workerId} has other weights after step ${step}`)
    }
  }

  /** One that is fenced and does not know it yet may not know of a rollback either. */
  checkOutcome(outcome: RunOutcome, coordinatorId: string): void {
    if (outcome.kind === 'failed') this.violated(`the run failed: ${outcome.failure.message}`)
    if (coordinatorId !== this.#epochOwner) return
    if (outcome.kind === 'stopped' && outcome.step > this.#committedStep) {
      this.violated('I4 stopped at a step that is not committed')
    }
  }

  /**
   * Here memory is never faulty, and nobody sleeps as long as a run waits: a recount or a worker
   * that is given up covers a defect up.
   */
  checkSaid(message: string): void {
    if (/does not match the contributions' digests/.test(message)) this.violated(`I1 ${message}`)
    if (/did not come for/.test(message)) this.violated(`I8 ${message}`)
  }

  checkEnd(): void {
    const { outcome, options } = this.world
    if (outcome?.kind !== 'succeeded') {
      this.violated(`I8 not ended ${options.endWithinMs} ms after the last fault`)
    }
    if (this.#committedStep !== this.reference.numSteps) this.violated('ended before the last step')
    const expected = this.reference.digests.at(-1)
    if (this.#repeats && outcome.weightsSha256 !== expected) {
      this.violated('I2 delivered other weights than the undisturbed run')
    }
  }
}

/** -1: all are the committed ones. */
const differingSlice = (record: CommitRecord, gradients: readonly bigint[]): number =>
  gradients.findIndex(
    (value, slice) => toy.publishedDigest(value, slice) !== record.slices[slice]?.publishedDigest,
  )
