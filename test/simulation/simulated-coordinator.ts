/**
 * A coordinator process: the real run machine in a toy shell. Two may run at once, one of them
 * fenced.
 */
import type { RunConfig, RunEffect, RunEvent, RunOutcome } from '../../coordinator/run-events.js'
import { RunMachine } from '../../coordinator/run-machine.js'
import type { FromWorker__Output } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { ToWorker } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { SimulatedProcess } from './simulated-process.js'
import type { SimulatedWorker } from './simulated-worker.js'
import type { World } from './world.js'

const tickMs = 100

export interface CoordinatorEnd {
  send(message: ToWorker): void
  close(): void
}

export class SimulatedCoordinator extends SimulatedProcess {
  outcome: RunOutcome | null = null
  readonly machine: RunMachine
  readonly #streams = new Map<string, CoordinatorEnd>()
  /** Also those whose Hello a sleeping coordinator has not read. */
  readonly #opened = new Set<CoordinatorEnd>()

  constructor(
    private readonly world: World,
    readonly config: RunConfig,
  ) {
    super(world.clock)
    this.machine = new RunMachine(config)
    this.#readLog()
    this.every(tickMs, () => this.advance({ kind: 'tick' }))
  }

  override crash(): void {
    super.crash()
    for (const end of this.#opened) end.close()
    this.#streams.clear()
  }

  open(end: CoordinatorEnd): void {
    this.#opened.add(end)
  }

  /** A worker's Hello: it keeps its id unless somebody else has it. */
  accept(worker: SimulatedWorker, end: CoordinatorEnd): string {
    const kept = worker.workerId !== '' && !this.#streams.has(worker.workerId)
    const workerId = kept ? worker.workerId : this.world.newWorkerId()
    this.#streams.set(workerId, end)
    this.advance({
      kind: 'workerAttached',
      worker: {
        workerId,
        identity: worker.identity,
        deviceClass: worker.deviceClass,
        host: 'host',
        device: 'toy',
        precisions: ['fp32'],
      },
    })
    return workerId
  }

  receive(workerId: string, end: CoordinatorEnd, message: FromWorker__Output): void {
    if (this.#streams.get(workerId) !== end) return
    this.advance({ kind: 'message', workerId, message })
  }

  streamBroke(workerId: string, end: CoordinatorEnd): void {
    this.#opened.delete(end)
    if (this.#streams.get(workerId) !== end) return
    this.#streams.delete(workerId)
    this.advance({ kind: 'workerLost', workerId, reason: 'its stream broke' })
  }

  advance(event: RunEvent): void {
    if (!this.isAlive) return
    this.world.count(`coordinator ${event.kind}`)
    const effects = this.machine.advance(event, this.world.clock.nowMs)
    for (const effect of effects) this.#perform(effect)
    this.world.checkCoordinatorBounds(this)
  }

  #readLog(): void {
    this.world.jetStream.read((log) =>
      this.guard(() => {
        if (log) this.advance({ kind: 'started', log })
        else this.after(100, () => this.#readLog())
      }),
    )
  }

  #perform(effect: RunEffect): void {
    const { world } = this
    switch (effect.kind) {
      case 'send':
        this.#streams.get(effect.workerId)?.send(effect.message)
        return
      case 'append':
        return this.#append(effect)
      case 'readLastRecord':
        return world.jetStream.read((log) =>
          this.guard(() =>
            this.advance(
              log
                ? { kind: 'lastRecordRead', last: log.at(-1) ?? null }
                : { kind: 'lastRecordUnreadable', reason: 'nats-server is away' },
            ),
          ),
        )
      case 'readLog':
        return this.#readLog()
      case 'storeCheckpoint': {
        const { step } = effect.manifest
        return this.after(world.random.between(1, 30), () =>
          this.advance(
            world.isDiskFull
              ? { kind: 'checkpointFailed', step, failure: { code: 'DISK_FULL', message: 'full' } }
              : { kind: 'checkpointStored', step, manifestDigest: `manifest ${step}` },
          ),
        )
      }
      case 'disconnect': {
        const end = this.#streams.get(effect.workerId)
        this.#streams.delete(effect.workerId)
        end?.close()
        return
      }
      case 'finish':
        this.outcome = effect.outcome
        world.coordinatorEnded(this, effect.outcome)
        return
      case 'event':
        return world.recordJobEvent(effect.event)
      case 'log':
        if (effect.level !== 'info') {
          const masked = effect.message.replace(/[0-9a-f]{16}|w\d+|\d+(\.\d+)?/g, 'N')
          world.count(`coordinator says ${masked}`)
        }
        world.trace(`${this.config.coordinatorId}: ${effect.message}`)
        return world.invariants.checkSaid(effect.message)
    }
  }

  #append({ record, expectedLastSequence }: Extract<RunEffect, { kind: 'append' }>): void {
    if (this.world.options.mutation === 'announceBeforeAck' && record.kind === 'commit') {
      this.advance({ kind: 'appendAcknowledged', sequence: expectedLastSequence + 1 })
    }
    this.world.jetStream.append(record, expectedLastSequence, (outcome) =>
      this.guard(() => {
        if (outcome.kind === 'stands') {
          this.advance({ kind: 'appendAcknowledged', sequence: outcome.sequence })
        } else {
          this.advance({ kind: outcome.kind === 'refused' ? 'appendRefused' : 'appendUnknown' })
        }
      }),
    )
  }
}
