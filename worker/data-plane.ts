/**
 * Moves gradients between the workers of a job: carries out the run machine's effects that name
 * slices, contributions and sums, and tells it what arrived. It decides nothing about steps; it
 * keeps every buffer bounded and heals what a core NATS server may lose.
 *
 *   sendContribution → offer → (owner) grant → frames → contributionArrived → countContribution →
 *   the sum finishSlice → the published slot → publishSum → frames to every worker → stored … →
 *   sumArrived
 */
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import { type CreditMessage, decodeCredit, isFrame, jobHash } from '../proto/frame.js'
import { allSumsSubject, creditSubject } from '../proto/subjects.js'
import { type DataPlaneCounts, DataPlaneLink, type EpochScope } from './data-plane-link.js'
import { DataPlaneOutbox } from './data-plane-outbox.js'
import { DataPlaneOwner } from './data-plane-owner.js'
import { DataPlanePublisher } from './data-plane-publisher.js'
import { DataPlaneReceiver } from './data-plane-receiver.js'
import type { ExchangeBuffers } from './exchange-buffers.js'
import type { GradientTransport } from './nats-connection.js'
import type { WorkerEffect, WorkerEvent } from './run-events.js'

type EffectKind =
  | 'openEpoch'
  | 'sendContribution'
  | 'cancelContribution'
  | 'openSlice'
  | 'closeSlice'
  | 'countContribution'
  | 'dropContribution'
  | 'finishSlice'
  | 'publishSum'
  | 'requestSum'
  | 'sendSum'
  | 'refuseSum'
  | 'acceptSums'
export type DataPlaneEffect = Extract<WorkerEffect, { kind: EffectKind }>
type EpochEffect = Exclude<DataPlaneEffect, { kind: 'openEpoch' | 'acceptSums' }>
type Effect<Kind extends EffectKind> = Extract<WorkerEffect, { kind: Kind }>

export interface DataPlaneClock {
  nowMs(): number
  /** Answers how to stop. */
  every(ms: number, run: () => void): () => void
}

export interface DataPlaneOptions {
  jobId: string
  workerId(): string
  exchange: ExchangeBuffers
  /** Called when a fleet of more than one worker first needs the bus. */
  connect(): Promise<GradientTransport>
  onEvent(event: WorkerEvent): void
  clock?: DataPlaneClock
}

const tickMs = 50
const reconnectMs = 500
const maxWaitingEffects = 10_000

const systemClock: DataPlaneClock = {
  nowMs: () => performance.now(),
  every(ms, run) {
    const timer = setInterval(run, ms)
    return () => clearInterval(timer)
  },
}

/** One fleet epoch: its subscriptions and everything that is under way in it. */
interface OpenEpoch {
  scope: Omit<EpochScope, 'link'> & { link: DataPlaneLink | null }
  owner: DataPlaneOwner
  /** Without others to talk to there is nobody to send to. */
  outbox: DataPlaneOutbox | null
  publisher: DataPlanePublisher | null
}

export class DataPlane {
  readonly counts: DataPlaneCounts = {
    framesSent: 0,
    bytesSent: 0,
    framesReceived: 0,
    bytesReceived: 0,
    framesRefused: 0,
    framesIgnored: 0,
    creditsRefused: 0,
    peakStagedBytes: 0,
  }
  readonly #clock: DataPlaneClock
  readonly #receiver: DataPlaneReceiver
  readonly #stopTicking: () => void
  #epoch: OpenEpoch | null = null
  /** Effects that came while the bus was being connected, in order; null: none is being. */
  #waiting: EpochEffect[] | null = null
  #isClosed = false

  constructor(private readonly options: DataPlaneOptions) {
    this.#clock = options.clock ?? systemClock
    this.#receiver = new DataPlaneReceiver((step, slice) =>
      this.#epoch?.publisher?.slotReused(step, slice),
    )
    this.#stopTicking = this.#clock.every(tickMs, () => this.#tick())
  }

  carryOut(effect: DataPlaneEffect): void {
    if (this.#isClosed) return
    if (effect.kind === 'openEpoch') return this.#openEpoch(effect)
    if (effect.kind === 'acceptSums') return this.#receiver.accept(effect.steps)
    if (this.#waiting === null) return this.#carryOut(effect)
    if (this.#waiting.length < maxWaitingEffects) this.#waiting.push(effect)
    else
      this.#fail(
        effect.kind,
        0,
        new Error(`nats-server has not answered; ${effect.kind} is dropped`),
      )
  }

  async close(): Promise<void> {
    this.#isClosed = true
    this.#stopTicking()
    this.#closeEpoch()
  }

  #openEpoch(effect: Effect<'openEpoch'>): void {
    this.#closeEpoch()
    if (effect.workerIds.length < 2) {
      this.#waiting = null
      return this.#enter(effect, null)
    }
    this.#waiting = []
    this.#connect(effect, this.#waiting)
  }

  /** Until the bus answers, or another epoch is opened: the server may be on its way back. */
  #connect(effect: Effect<'openEpoch'>, waiting: EpochEffect[]): void {
    const isWanted = () => this.#waiting === waiting && !this.#isClosed
    this.options.connect().then(
      (transport) => {
        if (!isWanted()) return
        this.#waiting = null
        this.#enter(effect, transport)
        for (const next of waiting) this.#carryOut(next)
      },
      () => {
        const stop = this.#clock.every(reconnectMs, () => {
          stop()
          if (isWanted()) this.#connect(effect, waiting)
        })
      },
    )
  }

  #enter(effect: Effect<'openEpoch'>, transport: GradientTransport | null): void {
    const base = {
      jobId: this.options.jobId,
      jobHash: jobHash(this.options.jobId),
      fleetEpoch: effect.fleetEpoch,
      workerId: this.options.workerId(),
      workerIds: effect.workerIds,
      exchange: this.options.exchange,
      counts: this.counts,
      nowMs: () => this.#clock.nowMs(),
      emit: (event: WorkerEvent) => {
        if (!this.#isClosed) this.options.onEvent(event)
      },
      fail: (operation: string, step: number, error: unknown) => this.#fail(operation, step, error),
    }
    if (transport === null) {
      const scope = { ...base, link: null }
      this.#epoch = { scope, owner: new DataPlaneOwner(scope), outbox: null, publisher: null }
      this.#receiver.openEpoch(null)
      return
    }
    const link = new DataPlaneLink(transport, base, () => this.#connectionReturned())
    const scope = { ...base, link }
    this.#epoch = {
      scope,
      owner: new DataPlaneOwner(scope),
      outbox: new DataPlaneOutbox(scope),
      publisher: new DataPlanePublisher(scope),
    }
    this.#receiver.openEpoch(scope)
    const { jobId, fleetEpoch, workerId } = scope
    link.subscribe(allSumsSubject(jobId, fleetEpoch), ({ data, reply }) =>
      this.#receiver.onFrame(data, reply, false),
    )
    link.subscribe(creditSubject(jobId, fleetEpoch, workerId), ({ data, reply, sender }) => {
      if (isFrame(data)) this.#receiver.onFrame(data, reply, true)
      else this.#onCredit(decodeCredit(data), sender)
    })
  }

  #carryOut(effect: EpochEffect): void {
    const epoch = this.#epoch
    if (epoch === null) return
    // What was decided before a raise has no place after it.
    if ('fleetEpoch' in effect && effect.fleetEpoch !== epoch.scope.fleetEpoch) return
    const { owner, outbox, publisher } = epoch
    switch (effect.kind) {
      case 'sendContribution':
        return outbox?.send(effect)
      case 'cancelContribution':
        return outbox?.cancel(effect)
      case 'openSlice':
        return owner.open(effect)
      case 'closeSlice':
        return owner.closeSlice(effect)
      case 'countContribution':
        return owner.count(effect)
      case 'dropContribution':
        return owner.dropContribution(effect)
      case 'finishSlice':
        return this.#finish(owner, effect)
      case 'publishSum':
        return publisher?.publish(effect)
      case 'requestSum':
        return this.#receiver.request(effect)
      case 'sendSum':
        return this.#sendSum(epoch, effect)
      case 'refuseSum':
        return this.#refuseSum(epoch, effect)
    }
  }

  #finish(owner: DataPlaneOwner, effect: Effect<'finishSlice'>): void {
    this.#receiver.holdOwn(effect)
    owner
      .finish(effect, (digest) => this.#receiver.ownIsWhole(effect, digest))
      .catch((error: unknown) => {
        this.#fail('finishSlice', effect.step, error)
      })
  }

  #sendSum(epoch: OpenEpoch, { step, slice, toWorkerId }: Effect<'sendSum'>): void {
    const sliceAttempt = this.#receiver.heldAttempt(step, slice)
    if (sliceAttempt === null) {
      return this.#refuseSum(epoch, { kind: 'refuseSum', step, slice, toWorkerId })
    }
    epoch.publisher?.sendTo(toWorkerId, { step, slice, sliceAttempt })
  }

  #refuseSum(epoch: OpenEpoch, { step, slice, toWorkerId }: Effect<'refuseSum'>): void {
    epoch.scope.link?.credit({ workerId: toWorkerId }, { kind: 'noSum', step, slice })
  }

  #onCredit(message: CreditMessage | null, sender: string): void {
    const epoch = this.#epoch
    if (epoch === null || message === null) return
    if (message.from !== sender) {
      this.counts.creditsRefused++
      return
    }
    switch (message.kind) {
      case 'offer':
        return epoch.owner.offered(message)
      case 'grant':
      case 'need':
      case 'delivered':
        return epoch.outbox?.receive(message)
      case 'stored':
      case 'needSum':
        return epoch.publisher?.receive(message)
      case 'noSum':
        return this.#receiver.refused(message)
      case 'wantSum': {
        const { step, slice, digest, from } = message
        return epoch.scope.emit({ kind: 'sumRequested', step, slice, digest, byWorkerId: from })
      }
    }
  }

  #connectionReturned(): void {
    this.#epoch?.outbox?.connectionReturned()
    this.#epoch?.owner.connectionReturned()
    this.#epoch?.publisher?.connectionReturned()
  }

  #tick(): void {
    const epoch = this.#epoch
    if (!epoch?.scope.link) return
    this.#receiver.tick()
    epoch.outbox?.tick()
    epoch.owner.tick()
    epoch.publisher?.tick()
  }

  #closeEpoch(): void {
    const epoch = this.#epoch
    this.#epoch = null
    this.#receiver.openEpoch(null)
    epoch?.outbox?.close()
    epoch?.owner.close()
    epoch?.publisher?.close()
    epoch?.scope.link?.close()
  }

  #fail(operation: string, step: number, cause: unknown): void {
    if (this.#isClosed) return
    const message = cause instanceof Error ? cause.message : String(cause)
    const known = cause instanceof TunemeshError && isErrorCode(cause.code)
    const code = known ? cause.code : 'ENGINE_FAILED'
    this.options.onEvent({ kind: 'engineFailed', operation, step, error: { code, message } })
  }
}
