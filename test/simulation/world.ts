/**
 * A whole simulated mesh: coordinators, workers, NATS, the faults of a seed, and the invariants.
 */
import type { RunOutcome } from '../../coordinator/run-events.js'
import type { CommitLogRecord } from '../../proto/commit-record.js'
import type { FromWorker__Output } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { JobEvent } from '../../proto/gen/tunemesh/v1/JobEvent.js'
import type { ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { WorkerService } from '../../proto/services.js'
import type { WorkerEffect, WorkerEvent } from '../../worker/run-events.js'
import { EarlySlices } from './early-slices.js'
import { Invariants } from './invariants.js'
import type { SimulationOptions } from './options.js'
import { Random } from './random.js'
import { configFor } from './reference-run.js'
import { SimulatedCoordinator } from './simulated-coordinator.js'
import { SimulatedCoreNats, SimulatedJetStream, SimulatedStream } from './simulated-network.js'
import { SimulatedWorker, type WorkerStream } from './simulated-worker.js'
import type { Frame } from './toy-data-plane.js'
import type { ToyWeights } from './toy-engine.js'
import { VirtualClock } from './virtual-clock.js'

const wire = WorkerService.service.Attach
const mostTraceLines = 4_000

export class World {
  readonly clock = new VirtualClock()
  readonly random: Random
  readonly jetStream: SimulatedJetStream
  readonly core: SimulatedCoreNats<Frame>
  readonly blobs = new Map<string, ToyWeights>()
  readonly workers: SimulatedWorker[] = []
  readonly invariants: Invariants
  readonly traceLines: string[] = []
  coordinator: SimulatedCoordinator | null = null
  isDiskFull = false
  uploadFailure = 0.05
  isTracing = false
  outcome: RunOutcome | null = null
  /**
   * How often each thing happened: a simulation that never meets a case proves nothing about it.
   */
  readonly counts = new Map<string, number>()
  readonly #earlySlices = new EarlySlices((what) => this.count(what))
  #numPlaces = 0
  #numWorkerIds = 0
  #numCoordinators = 0
  #isHealed = false

  constructor(readonly options: SimulationOptions) {
    this.random = new Random(options.seed ^ 0x5eed)
    this.jetStream = new SimulatedJetStream(this.clock, this.random, options.faults)
    this.jetStream.ignoresExpectedSequence = options.mutation === 'skipFencing'
    this.core = new SimulatedCoreNats(this.clock, this.random, options.faults)
    this.invariants = new Invariants(this)
    this.jetStream.onAppended = (logged) => {
      this.trace(`log ${logged.sequence} ${describe(logged.record)}`)
      this.invariants.recordAppended(logged)
      this.#countRecord(logged.record)
    }
  }

  /** Throws where an invariant breaks or a live run does not end in time. */
  run(): void {
    const { options, clock } = this
    this.startCoordinator()
    for (let worker = 0; worker < options.numWorkers; worker++) this.startWorker()
    this.#scheduleFaults()
    clock.after(options.faultsUntilMs, () => this.#heal())
    const endMs =
      options.faultsUntilMs + (options.mode === 'liveness' ? options.endWithinMs : 2_000)
    clock.runUntil(endMs, () => this.outcome?.kind === 'succeeded')
    if (options.mode === 'liveness' || this.outcome?.kind === 'succeeded') {
      this.invariants.checkEnd()
    }
  }

  count(what: string): void {
    this.counts.set(what, (this.counts.get(what) ?? 0) + 1)
  }

  trace(line: string): void {
    if (this.isTracing) console.log(`${this.clock.nowMs.toFixed(1).padStart(9)} ${line}`)
    this.traceLines.push(`${this.clock.nowMs.toFixed(1).padStart(9)} ${line}`)
    if (this.traceLines.length > mostTraceLines) this.traceLines.shift()
  }

  // ---- processes ----

  startCoordinator(): void {
    const id = `c${++this.#numCoordinators}`
    this.trace(`coordinator ${id} starts`)
    this.coordinator = new SimulatedCoordinator(this, configFor(this.options, id))
  }

  startWorker(identity = `place ${++this.#numPlaces}`): void {
    if (this.workers.filter((worker) => worker.isAlive).length >= this.options.mostWorkers) return
    const deviceClass = this.random.pick(this.options.deviceClasses)
    const worker = new SimulatedWorker(this, deviceClass, this.random.pick([1, 1, 2, 4]), identity)
    this.workers.push(worker)
    worker.after(this.random.between(1, 50), () => this.attach(worker))
  }

  newWorkerId(): string {
    return `w${++this.#numWorkerIds}`
  }

  attach(worker: SimulatedWorker): void {
    const { coordinator } = this
    if (worker.stream) return
    if (!coordinator?.isAlive || coordinator.outcome) {
      worker.after(50, () => this.attach(worker))
      return
    }
    const stream: WorkerStream = new SimulatedStream(this.clock, this.random, {
      up: (message) => coordinator.guard(() => coordinator.receive(workerId, end, toUp(message))),
      down: (message) =>
        worker.guard(() => {
          if (worker.stream === stream) worker.advance({ kind: 'message', message })
        }),
      upBroken: () => coordinator.guard(() => coordinator.streamBroke(workerId, end)),
      downBroken: () =>
        worker.guard(() => {
          if (worker.stream === stream) worker.detached()
        }),
    })
    const end = {
      send: (message: Parameters<typeof wire.responseSerialize>[0]) =>
        stream.sendDown(
          wire.responseDeserialize(wire.responseSerialize(message)) as ToWorker__Output,
        ),
      close: () => stream.break(),
    }
    let workerId = ''
    worker.stream = stream
    coordinator.open(end)
    coordinator.guard(() => {
      if (stream.isBroken) return
      workerId = coordinator.accept(worker, end)
      worker.guard(() => worker.attached(workerId))
    })
  }

  workerExits(worker: SimulatedWorker): void {
    this.trace(`worker ${worker.workerId} exits`)
    worker.crash()
  }

  workerRestarts(worker: SimulatedWorker): void {
    this.trace(`worker ${worker.workerId} restarts: its device has failed`)
    this.count('device failure')
    worker.crash()
    this.clock.after(this.random.between(50, 800), () => this.startWorker(worker.identity))
  }

  coordinatorEnded(coordinator: SimulatedCoordinator, outcome: RunOutcome): void {
    this.count(outcome.kind)
    this.trace(`coordinator ${coordinator.config.coordinatorId} ends: ${JSON.stringify(outcome)}`)
    this.invariants.checkOutcome(outcome, coordinator.config.coordinatorId)
    if (outcome.kind === 'succeeded') this.outcome = outcome
    if (outcome.kind !== 'fenced' && outcome.kind !== 'stopped') return
    this.clock.after(1, () => coordinator.crash())
    // Resumed, or the winner of the race is not where workers look for it.
    if (coordinator === this.coordinator) {
      this.clock.after(this.random.between(20, 400), () => this.startCoordinator())
    }
  }

  publish(frame: Frame): void {
    const sent = this.#isCorrupting(frame) ? { ...frame, value: frame.value ^ (1n << 30n) } : frame
    for (const worker of this.workers) {
      if (!worker.isAlive) continue
      this.core.deliver(sent, (received) => worker.guard(() => worker.dataPlane.receive(received)))
    }
  }

  #isCorrupting(frame: Frame): frame is Extract<Frame, { kind: 'sum' }> {
    const { mutation } = this.options
    return mutation === 'trustUnverifiedSums' && frame.kind === 'sum' && this.random.chance(0.05)
  }

  // ---- faults ----

  #scheduleFaults(): void {
    const { faults } = this.options
    const live = () => this.workers.filter((worker) => worker.isAlive)
    this.#repeat(faults.crashWorkerMs, () => {
      const [victim] = live().sort(() => this.random.next() - 0.5)
      if (!victim) return
      this.trace(`worker ${victim.workerId} is killed`)
      victim.crash()
      this.clock.after(this.random.between(50, 800), () => this.startWorker(victim.identity))
    })
    this.#repeat(faults.pauseWorkerMs, () => {
      const victim = this.random.pick([null, ...live()])
      if (!victim) return
      this.trace(`worker ${victim.workerId} is paused`)
      victim.pause(this.random.between(100, 2_500))
    })
    this.#repeat(faults.breakStreamMs, () => {
      const victim = this.random.pick([null, ...live()])
      this.trace(`stream of ${victim?.workerId} breaks`)
      victim?.stream?.break()
    })
    this.#repeat(faults.crashCoordinatorMs, () => {
      const { coordinator } = this
      if (!coordinator?.isAlive || coordinator.outcome) return
      this.trace('the coordinator is killed')
      coordinator.crash()
      this.clock.after(this.random.between(50, 600), () => this.startCoordinator())
    })
    this.#repeat(faults.takeOverMs, () => this.#takeOver())
    this.#repeat(faults.stopNatsMs, () => {
      this.trace('nats-server is killed')
      this.#setNats(false)
      this.clock.after(this.random.between(50, 1_500), () => this.#setNats(true))
    })
    this.#repeat(faults.joinMs, () => this.startWorker())
    this.#repeat(faults.drainMs, () => {
      const victim = this.random.pick([null, ...live()])
      this.trace(`worker ${victim?.workerId} is asked to drain`)
      victim?.guard(() => victim.advance({ kind: 'drainAsked', reason: 'SIGTERM' }))
      this.clock.after(this.random.between(50, 1_500), () => this.startWorker())
    })
    this.#repeat(faults.diskFullMs, () => {
      this.isDiskFull = true
      this.clock.after(this.random.between(100, 1_500), () => {
        this.isDiskFull = false
      })
    })
    this.#repeat(faults.stopJobMs, () => {
      const now = this.random.chance(0.4)
      this.trace(`stop is asked, now: ${now}`)
      const { coordinator } = this
      coordinator?.guard(() => coordinator.advance({ kind: 'stopAsked', now }))
    })
  }

  #repeat(meanMs: number, act: () => void): void {
    if (meanMs === 0) return
    this.clock.after(this.random.between(0.3, 1.7) * meanMs, () => {
      if (this.#isHealed || this.outcome) return
      act()
      this.#repeat(meanMs, act)
    })
  }

  /** A second coordinator starts while the first one sleeps; later the first wakes up. */
  #takeOver(): void {
    const old = this.coordinator
    if (!old?.isAlive || old.outcome) return
    this.trace(`coordinator ${old.config.coordinatorId} sleeps, another one takes over`)
    old.pause(this.random.between(200, 2_500))
    for (const worker of this.workers) worker.stream?.break()
    this.clock.after(this.random.between(10, 200), () => this.startCoordinator())
  }

  #setNats(isUp: boolean): void {
    this.jetStream.isUp = isUp
    this.core.isUp = isUp
    const { coordinator } = this
    coordinator?.guard(() => coordinator.advance({ kind: isUp ? 'busBack' : 'busLost' }))
  }

  /** From here on nothing breaks: a live system must end. */
  #heal(): void {
    this.trace('faults end')
    this.#isHealed = true
    if (this.options.mode === 'safety') return
    Object.assign(this.options.faults, { loss: 0, reordering: 0, unknownAppend: 0 })
    this.uploadFailure = 0
    this.isDiskFull = false
    this.#setNats(true)
    this.clock.after(3_000, () => {
      const live = this.workers.filter((worker) => worker.isAlive).length
      for (let worker = live; worker < this.options.numWorkers; worker++) this.startWorker()
    })
  }

  #countRecord(record: CommitLogRecord): void {
    this.count(record.kind === 'epoch' ? `epoch ${record.reason}` : record.kind)
    if (record.kind === 'rollback' && this.options.isFree) this.count('rollback in free mode')
    if (record.kind !== 'commit') return
    this.#earlySlices.noteCommit(record)
    if (record.leases.some((lease) => lease.leaseAttempt > 1)) this.count('lease computed again')
    if (record.slices.some((slice) => slice.sliceAttempt > 1)) this.count('slice moved')
    if (new Set(record.leases.map((lease) => lease.workerId)).size > 1) this.count('shared step')
  }

  // ---- what the processes call ----

  emptyContribution(): bigint[] {
    return Array.from({ length: this.options.numSlices }, () => 0n)
  }

  /** Breakages for mutation checks; the product's code is not touched. */
  mutateWorkerEffect(effect: WorkerEffect): WorkerEffect {
    const { mutation } = this.options
    this.count(`worker ${effect.kind}`)
    if (effect.kind === 'send') {
      for (const kind of Object.keys(effect.message)) this.count(kind)
      this.#earlySlices.noteSent(effect.message)
    }
    if (mutation === 'countTwice' && effect.kind === 'dropContribution') {
      return { ...effect, kind: 'countContribution', slot: null }
    }
    if (mutation === 'forgetLease' && effect.kind === 'countContribution') {
      const { kind: _, slot, ...key } = effect
      if (slot === null && this.random.chance(0.2)) return { kind: 'dropContribution', ...key }
    }
    return effect
  }

  recordJobEvent(event: JobEvent): void {
    if (event.stalled) this.trace(`stalled: ${JSON.stringify(event.stalled)}`)
    if (event.stateChanged?.state === 'PAUSED') this.count('pause')
  }

  mutateWorkerEvent(event: WorkerEvent): WorkerEvent {
    if (this.options.mutation !== 'trustUnverifiedSums' || event.kind !== 'sumArrived') return event
    const digest = this.invariants.reference.published[event.step]?.[event.slice]
    return digest === undefined ? event : { ...event, digest }
  }

  checkApplied(worker: SimulatedWorker, step: number, gradients: bigint[]): void {
    this.invariants.checkApplied(worker, step, gradients)
  }

  checkWorkerBounds(worker: SimulatedWorker): void {
    worker.assertBounds((what) => this.invariants.violated(`I6 ${worker.workerId}: ${what}`))
  }

  checkCoordinatorBounds({ machine }: SimulatedCoordinator): void {
    const { run } = machine
    const fail = (what: string) => this.invariants.violated(`I6 coordinator: ${what}`)
    if (run.steps.size > 4) fail(`${run.steps.size} open steps`)
    if (run.appends.queue.length > 3) fail(`${run.appends.queue.length} appends queued`)
    if (run.histories.size > 1_000) fail(`${run.histories.size} histories`)
  }
}

const toUp = (message: Parameters<typeof wire.requestSerialize>[0]): FromWorker__Output =>
  wire.requestDeserialize(wire.requestSerialize(message)) as FromWorker__Output

const describe = (record: { kind: string; fleetEpoch: number; coordinatorId: string }): string => {
  const { kind, fleetEpoch, coordinatorId } = record
  const step = 'step' in record ? ` step ${record.step}` : ''
  const reason = 'reason' in record ? ` (${record.reason})` : ''
  return `${kind}${step} epoch ${fleetEpoch} by ${coordinatorId}${reason}`
}
