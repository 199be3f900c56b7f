/**
 * Runs one job: turns sockets, the commit log and the clock into events for the run machine, and
 * carries out its effects in order. It decides nothing; coordinator/run-machine.ts does.
 */
import type { Logger } from 'pino'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import { failpoint } from '../proto/failpoint.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { CheckpointStore } from './checkpoint-store.js'
import type { CommitLog } from './commit-log.js'
import type { Fleet, FleetWorker } from './fleet.js'
import type { RunConfig, RunEffect, RunEvent, RunFailure, RunOutcome } from './run-events.js'
import { RunMachine } from './run-machine.js'

const tickMs = 200

export interface JobRunnerOptions {
  config: RunConfig
  fleet: Fleet
  commitLog: CommitLog
  checkpoints: CheckpointStore
  /** `save_total_limit` of the job file. */
  numCheckpointsKept: number
  /** Monotonic. */
  nowMs: () => number
  log: Logger
  /** Every event of the run, in order, before it is stored. */
  onEvent: (event: JobEvent) => void
}

export class JobRunner {
  readonly #machine: RunMachine
  readonly #finished: Promise<RunOutcome>
  #finish: (outcome: RunOutcome) => void = () => {}
  #fail: (error: unknown) => void = () => {}
  #ended = false
  /** Events that arrived while the machine was at work. */
  readonly #waiting: RunEvent[] = []
  #isHandling = false

  constructor(private readonly options: JobRunnerOptions) {
    this.#machine = new RunMachine(options.config)
    this.#finished = new Promise((resolve, reject) => {
      this.#finish = resolve
      this.#fail = reject
    })
  }

  async run(): Promise<RunOutcome> {
    const { fleet, commitLog, config } = this.options
    const log = await commitLog.readAll(config.jobId)
    const timer = setInterval(() => this.#take({ kind: 'tick' }), tickMs)
    fleet.on('attached', this.#onAttached)
    fleet.on('lost', this.#onLost)
    fleet.on('message', this.#onMessage)
    fleet.on('exhausted', this.#onExhausted)
    try {
      this.#take({ kind: 'started', log })
      for (const worker of fleet.workers) this.#onAttached(worker)
      if (fleet.exhausted) this.#onExhausted(fleet.exhausted)
      return await this.#finished
    } finally {
      this.#ended = true
      clearInterval(timer)
      fleet.off('attached', this.#onAttached)
      fleet.off('lost', this.#onLost)
      fleet.off('message', this.#onMessage)
      fleet.off('exhausted', this.#onExhausted)
      this.#releaseWorkers()
    }
  }

  stop(now: boolean): void {
    this.#take({ kind: 'stopAsked', now })
  }

  /** Goes on from a pause at once. */
  resume(): void {
    this.#take({ kind: 'resumeAsked' })
  }

  busChanged(isUp: boolean): void {
    this.#take({ kind: isUp ? 'busBack' : 'busLost' })
  }

  readonly #onAttached = (worker: FleetWorker) => {
    worker.jobId = this.options.config.jobId
    const { deviceClass, host, device, precisions } = worker.hello
    const { id: workerId, identity } = worker
    const attached = { workerId, identity, deviceClass, host, device, precisions }
    this.#take({ kind: 'workerAttached', worker: attached })
  }

  readonly #onLost = (worker: FleetWorker, reason: string) => {
    this.#take({ kind: 'workerLost', workerId: worker.id, reason })
  }

  readonly #onMessage = (worker: FleetWorker, message: FromWorker__Output) => {
    this.#take({ kind: 'message', workerId: worker.id, message })
  }

  readonly #onExhausted = (error: TunemeshError) => {
    this.#take({ kind: 'workersExhausted', failure: failureOf(error) })
  }

  /** One event at a time: an effect may bring the next event about before it returns. */
  #take(event: RunEvent): void {
    if (this.#ended) return
    this.#waiting.push(event)
    if (this.#isHandling) return
    this.#isHandling = true
    try {
      for (let next = this.#waiting.shift(); next !== undefined; next = this.#waiting.shift()) {
        const effects = this.#machine.advance(next, this.options.nowMs())
        for (const effect of effects) this.#carryOut(effect)
      }
    } catch (error) {
      this.#fail(error)
    } finally {
      this.#isHandling = false
    }
  }

  #carryOut(effect: RunEffect): void {
    const { fleet, log } = this.options
    switch (effect.kind) {
      case 'send':
        this.#noteState(effect.workerId, effect.message)
        fleet.send(effect.workerId, effect.message)
        return
      case 'append':
        this.#answer(this.#append(effect), { kind: 'appendUnknown' })
        return
      case 'readLastRecord':
        this.#answer(this.#readLast(), { kind: 'lastRecordUnreadable', reason: 'internal' })
        return
      case 'storeCheckpoint':
        this.#answer(this.#storeCheckpoint(effect), null)
        return
      case 'event':
        this.options.onEvent(effect.event)
        return
      case 'disconnect':
        // The machine knows; it must not hear of its own act as a loss.
        fleet.off('lost', this.#onLost)
        fleet.disconnect(effect.workerId, effect.reason)
        fleet.on('lost', this.#onLost)
        return
      case 'finish':
        this.#ended = true
        this.#finish(effect.outcome)
        return
      case 'log':
        log[effect.level]({ workerId: effect.workerId }, effect.message)
    }
  }

  /**
   * The event that answers an effect; what it throws is ours and ends the run, unless `otherwise`
   * says.
   */
  #answer(work: Promise<RunEvent>, otherwise: RunEvent | null): void {
    work.then(
      (event) => this.#take(event),
      (error) => {
        if (otherwise === null) this.#fail(error)
        else {
          this.options.log.warn({ err: error }, 'the commit log did not answer')
          this.#take(otherwise)
        }
      },
    )
  }

  async #append(effect: RunEffect & { kind: 'append' }): Promise<RunEvent> {
    const { commitLog, config } = this.options
    failpoint(`coordinator.before-append-${effect.record.kind}`)
    const result = await commitLog.append(config.jobId, effect.record, effect.expectedLastSequence)
    failpoint(`coordinator.after-append-${effect.record.kind}`)
    if (effect.record.kind === 'checkpoint' && result.outcome === 'ok') this.#removeOldCheckpoints()
    switch (result.outcome) {
      case 'ok':
        return { kind: 'appendAcknowledged', sequence: result.sequence }
      case 'conflict':
        return { kind: 'appendRefused' }
      case 'unknown':
        return { kind: 'appendUnknown' }
    }
  }

  async #readLast(): Promise<RunEvent> {
    const { commitLog, config } = this.options
    try {
      return { kind: 'lastRecordRead', last: await commitLog.readLast(config.jobId) }
    } catch (error) {
      return { kind: 'lastRecordUnreadable', reason: (error as Error).message }
    }
  }

  async #storeCheckpoint(effect: RunEffect & { kind: 'storeCheckpoint' }): Promise<RunEvent> {
    const { step } = effect.manifest
    try {
      failpoint('coordinator.before-manifest')
      const manifestDigest = await this.options.checkpoints.store(effect.manifest)
      failpoint('coordinator.after-manifest')
      return { kind: 'checkpointStored', step, manifestDigest }
    } catch (error) {
      return { kind: 'checkpointFailed', step, failure: failureOf(error) }
    }
  }

  #removeOldCheckpoints(): void {
    const { checkpoints, config, numCheckpointsKept } = this.options
    checkpoints.removeOld(config.jobId, numCheckpointsKept).catch((error) => {
      this.options.log.warn({ err: error }, 'old checkpoints could not be removed')
    })
  }

  /** What lists show of a worker follows from what it was told last. */
  #noteState(workerId: string, message: object): void {
    const worker = this.options.fleet.get(workerId)
    if (worker === undefined || worker.state === 'draining') return
    if ('prepare' in message || 'loadState' in message) worker.state = 'preparing'
    if ('stepPlan' in message) worker.state = 'training'
    if ('releaseJob' in message) worker.state = 'idle'
    worker.jobId = worker.state === 'idle' ? '' : this.options.config.jobId
  }

  #releaseWorkers(): void {
    for (const worker of this.options.fleet.workers) {
      if (worker.jobId !== this.options.config.jobId) continue
      worker.stream.send({ releaseJob: { jobId: worker.jobId } })
      if (worker.state !== 'draining') worker.state = 'idle'
      worker.jobId = ''
      worker.share = 0
    }
  }
}

function failureOf(error: unknown): RunFailure {
  if (error instanceof TunemeshError) return { code: error.code, message: error.message }
  const { code, message } = error as { code?: unknown; message?: string }
  return { code: isErrorCode(code) ? code : 'INTERNAL', message: message ?? String(error) }
}
