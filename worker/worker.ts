/**
 * A worker process: attached to the coordinator by one stream, it trains one job at a time and
 * answers engine calls.
 */
import { cpus, release } from 'node:os'
import { Blobs } from '../client/blobs.js'
import { TunemeshError } from '../proto/errors.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { ToWorker__Output as ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { Welcome__Output as Welcome } from '../proto/gen/tunemesh/v1/Welcome.js'
import { BlobService } from '../proto/services.js'
import type { TrainRequest } from '../proto/train-spec.js'
import { version } from '../proto/version.js'
import { AttachStream } from './attach-stream.js'
import type { CoordinatorAccess } from './coordinator-access.js'
import { DataBus } from './data-bus.js'
import { DataPlane } from './data-plane.js'
import { type DeviceOptions, describeDevice } from './device.js'
import { EngineCalls } from './engine-calls.js'
import type { JobEngine } from './job-engine.js'
import { JobFiles } from './job-files.js'
import { ModelCache } from './model-cache.js'
import { NatsConnection } from './nats-connection.js'
import type { WorkerEvent } from './run-events.js'
import { WorkerRunMachine } from './run-machine.js'
import { StepLoop } from './step-loop.js'

/** How often the worker looks whether its certificate is due: a small part of its life. */
const lookForRenewalMs = 10 * 60_000
/** A transfer that is quiet for longer is over, or waits for the coordinator. */
const movingForMs = 3_000

export interface WorkerOptions {
  coordinator: string
  access: CoordinatorAccess
  host: string
  /** Its place on the host, the same after a restart. */
  place: string
  workDir: string
  /** Shared by the workers of this machine. */
  modelCacheDir: string
  /** Most that it holds; null: three quarters of its disk. */
  modelCacheBytes: number | null
  device: DeviceOptions
  /** How long the coordinator may be away before the worker ends. */
  giveUpAfterMs: number
  doubtAfterMs: number
  requestSumEveryMs: number
  log(level: 'info' | 'warn' | 'error', message: string): void
}

/** What this process runs on, for people. */
function systemText(): string {
  const { platform, arch } = process
  const [processor] = cpus()
  const node = process.version.slice(1)
  const model = processor?.model.trim() || 'unknown processor'
  return `${platform} ${release()} ${arch}, Node ${node}, ${cpus().length} × ${model}`
}

export class Worker {
  readonly #stream: AttachStream
  readonly #files: JobFiles
  readonly #calls: EngineCalls
  #loop: StepLoop | null = null
  /** One worker alone never needs it. */
  readonly #bus = new DataBus((address) => NatsConnection.open(address))
  #welcome: Welcome | null = null
  #heartbeat: NodeJS.Timeout | null = null
  #doing = 'idle'
  #isDraining = false
  #isAttached = false
  #detachedAtMs: number | null = null
  #step = 0
  /** Of all files so far; what moves now, and when that was last heard of. */
  #movedBytes = 0
  #moving = ''
  #movedAtMs = Number.NEGATIVE_INFINITY
  /** Why this process must end and another take its place; null: it need not. */
  #deviceFailure: string | null = null

  constructor(private readonly options: WorkerOptions) {
    const { access } = options
    const described = describeDevice(options.device)
    this.#stream = new AttachStream({
      address: options.coordinator,
      access,
      giveUpAfterMs: options.giveUpAfterMs,
      hello: {
        version,
        host: options.host,
        name: `${options.device.device ?? 'cpu'} ${options.place}`,
        ...described,
        system: systemText(),
        processId: process.pid,
      },
      log: options.log,
      onWelcome: (welcome) => this.#attached(welcome),
      onMessage: (message) => this.#receive(message),
      onBreak: (reason) => this.#detached(reason),
    })
    const blobs = new Blobs(
      new BlobService(options.coordinator, access.credentials, {
        ...access.channelOptions,
        // A connection of its own: heartbeats and commits must not queue behind a model's file.
        'grpc.use_local_subchannel_pool': 1,
      }),
      access.token,
    )
    const patienceMs = options.giveUpAfterMs
    this.#files = new JobFiles({
      blobs,
      workDir: options.workDir,
      models: new ModelCache({
        blobs,
        folder: options.modelCacheDir,
        patienceMs,
        maxBytes: options.modelCacheBytes,
        log: options.log,
      }),
      patienceMs,
      onMoved: (numBytes, doing) => this.#moved(numBytes, doing),
    })
    this.#calls = new EngineCalls(options.device, this.#files, (message) => this.#answer(message))
  }

  /**
   * Runs until drained, told to end, or the coordinator has been away too long.
   * @throws TunemeshError DEVICE_FAILED where another process must go on
   */
  async run(): Promise<void> {
    const renewal = setInterval(() => void this.#renewCertificate(), lookForRenewalMs)
    try {
      await this.#stream.run()
    } finally {
      if (this.#heartbeat) clearInterval(this.#heartbeat)
      clearInterval(renewal)
      if (this.#deviceFailure === null) {
        await this.#loop?.close()
        await this.#calls.release()
      }
      await this.#bus.close()
      await this.#files.clear()
    }
    if (this.#deviceFailure !== null) {
      throw new TunemeshError('DEVICE_FAILED', this.#deviceFailure)
    }
  }

  /** A device's errors stay with its process: what was said goes out, then this one ends. */
  #endAfterFailure(reason: string): void {
    if (this.#deviceFailure !== null) return
    this.#deviceFailure = reason
    this.options.log('error', `the device has failed, a new process must go on: ${reason}`)
    this.#stream.close()
  }

  /** Of the engine outside of training. */
  #answer(message: FromWorker): void {
    this.#send(message)
    const error = message.planResult?.error ?? message.generateResult?.error
    if (error?.code === 'DEVICE_FAILED') this.#endAfterFailure(error.message ?? '')
  }

  /** Leaves between steps; at once where no job runs, or where nobody is there to hand over to. */
  drain(reason: string): void {
    this.#isDraining = true
    this.#loop?.handle({ kind: 'drainAsked', reason })
    this.#closeIfDrained()
  }

  #closeIfDrained(): void {
    const holdsNothing = this.#doing === 'preparing' && this.#loop?.isEmpty !== false
    const isFree = this.#doing === 'idle' || !this.#isAttached || holdsNothing
    if (this.#isDraining && isFree) this.#stream.close()
  }

  #attached(welcome: Welcome): void {
    this.#welcome = welcome
    this.#bus.moveTo(this.options.access.natsAddress(welcome))
    void this.#renewCertificate()
    if (this.options.access.isRemote) void this.#tryBus()
    if (this.#detachedAtMs !== null) {
      const seconds = ((performance.now() - this.#detachedAtMs) / 1000).toFixed(1)
      this.options.log('info', `attached again after ${seconds} s as ${welcome.workerId}`)
    }
    this.#isAttached = true
    this.#loop?.handle({ kind: 'attached', workerId: welcome.workerId })
    if (this.#heartbeat) clearInterval(this.#heartbeat)
    this.#heartbeat = setInterval(() => this.#beat(), welcome.heartbeatMs || 1_000)
  }

  /** A job would wait for it in silence. */
  async #tryBus(): Promise<void> {
    try {
      await this.#bus.connection()
    } catch (error) {
      const why = `gradients can not be sent, is its port open? ${(error as Error).message}`
      this.options.log('warn', why)
    }
  }

  async #renewCertificate(): Promise<void> {
    try {
      const isNew = await this.options.access.renewIfDue(Date.now())
      if (isNew) this.options.log('info', "this host's certificate is renewed")
    } catch (error) {
      this.options.log('warn', `the certificate is not renewed yet: ${(error as Error).message}`)
    }
  }

  #detached(reason: string): void {
    this.options.log('warn', `the coordinator's stream broke: ${reason}`)
    this.#isAttached = false
    this.#detachedAtMs = performance.now()
    this.#loop?.handle({ kind: 'detached' })
    this.#closeIfDrained()
  }

  #beat(): void {
    const { user, system } = process.cpuUsage()
    this.#send({
      heartbeat: {
        residentBytes: process.memoryUsage.rss(),
        cpuSeconds: (user + system) / 1e6,
        step: this.#step,
        doing: performance.now() - this.#movedAtMs < movingForMs ? this.#moving : this.#doing,
        progressBytes: this.#movedBytes,
      },
    })
  }

  #moved(numBytes: number, doing: string): void {
    this.#movedBytes += numBytes
    this.#moving = doing
    this.#movedAtMs = performance.now()
  }

  #receive(message: ToWorker): void {
    if (message.planCall) return this.#calls.plan(message.planCall)
    if (message.generateCall) return this.#calls.generate(message.generateCall)
    if (message.shutdown) return this.#stream.close()
    if (message.renewedNats) return this.#bus.renew(message.renewedNats)
    if (message.prepare) {
      this.#loop ??= this.#newLoop(JSON.parse(message.prepare.trainSpecJson) as TrainRequest)
      this.#doing = 'preparing'
    } else if (message.stepPlan) {
      this.#doing = 'training'
      this.#step = message.stepPlan.step
    }
    this.#loop?.handle({ kind: 'message', message })
    if (message.releaseJob) {
      this.#doing = 'idle'
      const { jobId, reason } = message.releaseJob
      if (reason !== '') {
        const waits = 'This worker waits for other jobs.'
        this.options.log('warn', `left idle while ${jobId} goes on: ${reason}. ${waits}`)
      }
      this.#closeIfDrained()
    }
  }

  #newLoop(request: TrainRequest): StepLoop {
    const { options } = this
    return new StepLoop({
      machine: new WorkerRunMachine({
        workerId: this.#welcome?.workerId ?? '',
        numContributionSlots: request.spec.numContributionSlots,
        doubtAfterMs: options.doubtAfterMs,
        requestSumEveryMs: options.requestSumEveryMs,
      }),
      files: this.#files,
      device: options.device,
      nowMs: () => performance.now(),
      freeMemory: () => this.#calls.release(),
      send: (message) => this.#send(message),
      assertReachable: () => this.#assertReachable(),
      openDataPlane: (job, onEvent) => this.#openDataPlane(job, onEvent),
      readCommitLog: async (jobId, after) =>
        (await this.#bus.connection()).readCommitLog(jobId, after),
      log: options.log,
      onExit: (reason) => {
        options.log('info', `leaving: ${reason}`)
        this.#stream.close()
      },
      onDeviceFailure: (reason) => this.#endAfterFailure(reason),
    })
  }

  /** On the coordinator's machine a worker alone needs no NATS, and nothing stands in the way. */
  async #assertReachable(): Promise<void> {
    if (!this.options.access.isRemote) return
    try {
      await this.#bus.connection()
    } catch (cause) {
      const { host, coordinator } = this.options
      throw new TunemeshError(
        'NATS_UNREACHABLE',
        `Host ${host}: ${(cause as Error).message} Gradients need that port of the coordinator ` +
          `as well as ${coordinator}: let this host reach both.`,
        { cause },
      )
    }
  }

  async #openDataPlane(job: JobEngine, onEvent: (event: WorkerEvent) => void): Promise<DataPlane> {
    return new DataPlane({
      jobId: job.prepare.jobId,
      workerId: () => this.#welcome?.workerId ?? '',
      exchange: job.exchange,
      connect: () => this.#bus.connection(),
      onEvent,
    })
  }

  #send(message: FromWorker): void {
    this.#stream.send(message)
  }
}
