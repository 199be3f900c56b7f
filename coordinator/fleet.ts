/**
 * All workers attached now: who they are, what they do, how to reach them. Decides only who is
 * dead.
 */
import { randomBytes } from 'node:crypto'
import { EventEmitter } from 'node:events'
import { TunemeshError } from '../proto/errors.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { Heartbeat__Output } from '../proto/gen/tunemesh/v1/Heartbeat.js'
import type { Hello__Output } from '../proto/gen/tunemesh/v1/Hello.js'
import type { ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { WorkerInfo } from '../proto/gen/tunemesh/v1/WorkerInfo.js'
import { type WorkerId, workerId } from '../proto/ids.js'
import { version } from '../proto/version.js'
import { GoneWorkers, workerMessage } from './fleet-report.js'

/** One attached stream; the service makes it, the fleet ends it. */
export interface WorkerStream {
  send(message: ToWorker): void
  end(reason: string): void
}

type WorkerState = 'idle' | 'preparing' | 'training' | 'draining'

export interface FleetWorker {
  readonly id: WorkerId
  readonly hello: Hello__Output
  /** Of its certificate; empty: a worker of this machine, on loopback. */
  readonly hostId: string
  /** Of its host and its place there: the same after a restart of its process. */
  readonly identity: string
  readonly stream: WorkerStream
  /** Monotonic time of its last message. */
  lastSeenMs: number
  readonly attachedAtMs: number
  heartbeat: Heartbeat__Output | null
  state: WorkerState
  jobId: string
  tokensPerSecond: number
  /** Of the last step's micro-batches. */
  share: number
  /** Memory by the plan of the job that it has prepared last. */
  plannedBytes: number
}

interface FleetEvents {
  attached: [FleetWorker]
  lost: [FleetWorker, reason: string]
  message: [FleetWorker, FromWorker__Output]
  /** A step stands that counts its work. */
  counted: [FleetWorker]
  /** A job begins and needs workers. */
  wanted: []
  /** Workers that the coordinator starts itself do not come back. */
  exhausted: [TunemeshError]
}

export interface FleetOptions {
  /** Silence after which a worker counts as dead. */
  deadAfterMs: number
  /** Monotonic. */
  nowMs: () => number
  maxWorkers: number
}

/** Also a NATS subject token, so nothing else may be in it. */
const idForm = /^w-[a-z0-9]{1,16}$/

export class Fleet extends EventEmitter<FleetEvents> {
  readonly #workers = new Map<WorkerId, FleetWorker>()
  readonly #gone = new GoneWorkers()
  /** Why no worker of this machine will attach; null: it may. */
  exhausted: TunemeshError | null = null
  #lastTickMs: number

  constructor(private readonly options: FleetOptions) {
    super()
    this.setMaxListeners(0)
    this.#lastTickMs = options.nowMs()
  }

  get workers(): FleetWorker[] {
    return [...this.#workers.values()]
  }

  /** As they are told; with `withGone` also those that have left a short while ago. */
  list(options: { withGone?: boolean } = {}): WorkerInfo[] {
    const now = this.options.nowMs()
    const attached = this.workers.map((worker) => workerMessage(worker, now))
    return options.withGone ? [...attached, ...this.#gone.list(now)] : attached
  }

  get(id: string): FleetWorker | undefined {
    return this.#workers.get(workerId(id))
  }

  /**
   * Takes a worker in, under its old id where it had one. Whoever calls has checked that it had.
   * @param hostId of its certificate; empty on loopback
   * @throws TunemeshError VERSION_MISMATCH
   */
  attach(hello: Hello__Output, stream: WorkerStream, hostId = ''): FleetWorker {
    if (hello.version !== version) {
      throw new TunemeshError(
        'VERSION_MISMATCH',
        `Worker on ${hello.host} runs tunemesh ${hello.version}, the coordinator ${version}. ` +
          'Install the same version on both.',
      )
    }
    const previous = hello.previousWorkerId
    const id = workerId(idForm.test(previous) ? previous : newWorkerId())
    if (!this.#workers.has(id) && this.#workers.size >= this.options.maxWorkers) {
      throw new TunemeshError(
        'STATE_CONFLICT',
        `${this.#workers.size} workers are attached, which is the limit. Let one leave first.`,
      )
    }
    // A worker comes back before its old stream was noticed to be gone.
    this.disconnect(id, 'attached anew')
    const worker: FleetWorker = {
      id,
      hello,
      hostId,
      identity: `${hostId || hello.host} ${hello.name || id}`,
      stream,
      lastSeenMs: this.options.nowMs(),
      attachedAtMs: this.options.nowMs(),
      heartbeat: null,
      state: 'idle',
      jobId: '',
      tokensPerSecond: 0,
      share: 0,
      plannedBytes: 0,
    }
    this.#workers.set(id, worker)
    this.#gone.forget(id)
    return worker
  }

  /** To be called once Welcome is sent: from now on others may send to it. */
  announce(worker: FleetWorker): void {
    this.emit('attached', worker)
  }

  receive(worker: FleetWorker, message: FromWorker__Output): void {
    if (this.#workers.get(worker.id) !== worker) return
    worker.lastSeenMs = this.options.nowMs()
    if (message.heartbeat) worker.heartbeat = message.heartbeat
    if (message.prepared) worker.plannedBytes = message.prepared.memory?.totalBytes ?? 0
    if (message.drain) worker.state = 'draining'
    this.emit('message', worker, message)
  }

  /** False: it is not attached (any more), and its run machine hears of that by `lost`. */
  send(id: string, message: ToWorker): boolean {
    const worker = this.get(id)
    if (worker === undefined) return false
    worker.stream.send(message)
    return true
  }

  /** Ends the worker's stream; it may attach anew. */
  disconnect(id: string, reason: string): void {
    const worker = this.get(id)
    if (worker !== undefined) this.#lose(worker, reason)
  }

  /** Its stream has ended by itself. */
  streamEnded(worker: FleetWorker, reason: string): void {
    if (this.#workers.get(worker.id) === worker) this.#lose(worker, reason)
  }

  /** A job begins. */
  want(): void {
    this.exhausted = null
    this.emit('wanted')
  }

  exhaust(error: TunemeshError): void {
    this.exhausted = error
    this.emit('exhausted', error)
  }

  /** A committed step counts so much of the work of a worker. */
  count(id: string, { share, tokensPerSecond }: { share: number; tokensPerSecond: number }): void {
    const worker = this.get(id)
    if (worker === undefined) return
    Object.assign(worker, { share, tokensPerSecond })
    if (share > 0) this.emit('counted', worker)
  }

  /**
   * To be called while no job runs or waits: one that came back when its job had ended holds it
   * still, and waits to be told that nobody needs it.
   */
  dismissDraining(): void {
    for (const { state, jobId, stream } of this.workers) {
      if (state === 'draining' && jobId === '') stream.send({ shutdown: { reason: 'drained' } })
    }
  }

  /** To be called about once a second. */
  tick(): void {
    const now = this.options.nowMs()
    // Where this process itself stood still, everybody was silent for it: that time does not count.
    const ownStallMs = Math.max(0, now - this.#lastTickMs - 2_000)
    this.#lastTickMs = now
    for (const worker of this.workers) {
      worker.lastSeenMs += ownStallMs
      const silentMs = now - worker.lastSeenMs
      if (silentMs > this.options.deadAfterMs) {
        this.#lose(worker, `silent for ${Math.round(silentMs)} ms`)
      }
    }
  }

  #lose(worker: FleetWorker, reason: string): void {
    this.#workers.delete(worker.id)
    this.#gone.add(worker, reason)
    worker.stream.end(reason)
    this.emit('lost', worker, reason)
  }
}

function newWorkerId(): string {
  const alphabet = 'abcdefghijkmnpqrstuvwxyz23456789'
  return `w-${[...randomBytes(5)].map((byte) => alphabet[byte % 32]).join('')}`
}
