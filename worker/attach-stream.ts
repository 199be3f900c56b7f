/**
 * The worker's one stream to the coordinator. It comes back by itself with capped, jittered delays
 * after a break, names the worker id it had, and keeps no message while it is away.
 */
import { setTimeout as delay } from 'node:timers/promises'
import * as grpc from '@grpc/grpc-js'
import { metadataWith } from '../client/rpc.js'
import { reconnectDelayMs } from '../proto/backoff.js'
import { errorKinds, TunemeshError } from '../proto/errors.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { Hello } from '../proto/gen/tunemesh/v1/Hello.js'
import type { ToWorker__Output as ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { Welcome__Output as Welcome } from '../proto/gen/tunemesh/v1/Welcome.js'
import { errorOfRpc } from '../proto/rpc-error.js'
import { WorkerService } from '../proto/services.js'

/** An attempt without Welcome for so long starts anew: TCP would wait up to a minute more. */
const attemptMs = 15_000
/** How often it is said again that the coordinator is still away. */
const tellEveryMs = 60_000
/** How long the coordinator may take to end a stream that this side has ended. */
const endGraceMs = 1_000

/** How the coordinator is spoken to: on loopback with its token, else with a certificate. */
export interface Access {
  credentials: grpc.ChannelCredentials
  channelOptions: grpc.ChannelOptions
  /** Empty: the certificate speaks for this worker. */
  token: string
  /** Why it can not be reached, where that can be told better than by gRPC; null: it can not. */
  diagnose(): Promise<TunemeshError | null>
}

export interface AttachOptions {
  address: string
  access: Access
  hello: Hello
  onWelcome(welcome: Welcome): void
  onMessage(message: ToWorker): void
  /**
   * The stream is away; messages meant for it are gone, the run machine decides what to say again.
   */
  onBreak(reason: string): void
  /** How long a worker tries to come back before it gives up and ends. */
  giveUpAfterMs: number
  log(level: 'info' | 'warn', message: string): void
}

export class AttachStream {
  /** Welcomed; null while the stream is away. */
  #call: grpc.ClientDuplexStream<FromWorker, ToWorker> | null = null
  /** Asked for, welcomed or not. */
  #newestCall: grpc.ClientDuplexStream<FromWorker, ToWorker> | null = null
  readonly #closing = new AbortController()
  #client: InstanceType<typeof WorkerService>
  #workerId = ''
  #workerProof = ''
  #isClosed = false
  readonly #metadata: grpc.Metadata

  constructor(private readonly options: AttachOptions) {
    this.#metadata = metadataWith(options.access.token)
    this.#client = this.#newClient()
  }

  #newClient(): InstanceType<typeof WorkerService> {
    const { address, access } = this.options
    return new WorkerService(address, access.credentials, {
      ...access.channelOptions,
      // Of its own: files do not queue before heartbeats, and a new client has a new connection.
      'grpc.use_local_subchannel_pool': 1,
    })
  }

  /**
   * Resolves when closed. Rejects when the coordinator stayed away for `giveUpAfterMs`, and at once
   * when it refused this worker for what only a person can mend: another version, a wrong token.
   */
  async run(): Promise<void> {
    const away = new Away(this.options)
    while (!this.#isClosed) {
      const { error, sawWelcome } = await this.#runOnce()
      if (this.#isClosed) return
      if (errorKinds[error.code].exit === 2) throw error
      // One that was welcomed before goes on trying: what answers now may be gone soon.
      const cause = this.#workerId === '' ? await this.#causeOf(error) : error
      if (errorKinds[cause.code].exit === 2) throw cause
      if (sawWelcome) {
        away.begin()
        this.options.onBreak(error.message)
      }
      const waitMs = away.failed(error)
      const { signal } = this.#closing
      await delay(waitMs, undefined, { signal }).catch(() => {})
    }
  }

  async #causeOf(error: TunemeshError): Promise<TunemeshError> {
    if (error.code !== 'COORDINATOR_UNREACHABLE') return error
    return (await this.options.access.diagnose()) ?? error
  }

  #runOnce(): Promise<{ error: TunemeshError; sawWelcome: boolean }> {
    return new Promise((resolve) => {
      let sawWelcome = false
      const call = this.#client.attach(this.#metadata)
      this.#newestCall = call
      const attempt = setTimeout(() => {
        end(noWelcome(this.options.address))
        call.cancel()
        this.#client.close()
        this.#client = this.#newClient()
      }, attemptMs)
      call.on('data', (message: ToWorker) => {
        if (message.welcome) {
          sawWelcome = true
          clearTimeout(attempt)
          this.#call = call
          this.#workerId = message.welcome.workerId
          this.#workerProof = message.welcome.workerProof
          this.options.onWelcome(message.welcome)
        } else this.options.onMessage(message)
      })
      const end = (error: TunemeshError) => {
        clearTimeout(attempt)
        if (this.#call === call) this.#call = null
        resolve({ error, sawWelcome })
      }
      // Not 'end': it comes before an error, and says nothing of the reason.
      call.on('error', (failure: grpc.ServiceError) => end(errorOfRpc(failure)))
      call.on('status', ({ code }: grpc.StatusObject) => {
        if (code === grpc.status.OK) end(streamEnded())
      })
      const previous = {
        previousWorkerId: this.#workerId,
        previousWorkerProof: this.#workerProof,
      }
      call.write({ hello: { ...this.options.hello, ...previous } })
    })
  }

  /** False where the stream is away: the message is not kept. */
  send(message: FromWorker): boolean {
    if (!this.#call) return false
    this.#call.write(message)
    return true
  }

  close(): void {
    this.#isClosed = true
    this.#closing.abort()
    const call = this.#newestCall
    // What was said before still goes out; a coordinator that stands still must not hold us here.
    if (this.#call) {
      this.#call.end()
      setTimeout(() => call?.cancel(), endGraceMs).unref()
    } else call?.cancel()
    this.#client.close()
  }
}

/** A coordinator that is away: since when, how often it was tried, what was said of it. */
class Away {
  #sinceMs = performance.now()
  #toldMs = Number.NEGATIVE_INFINITY
  #failures = 0

  constructor(private readonly options: AttachOptions) {}

  /** It was there until now. */
  begin(): void {
    this.#sinceMs = performance.now()
    this.#toldMs = Number.NEGATIVE_INFINITY
    this.#failures = 0
  }

  /** Answers how long to wait before the next attempt. @throws where it was away too long */
  failed(error: TunemeshError): number {
    const { address, giveUpAfterMs, log } = this.options
    const now = performance.now()
    const leftMs = this.#sinceMs + giveUpAfterMs - now
    if (leftMs < 0) throw error
    if (now - this.#toldMs >= tellEveryMs) {
      this.#toldMs = now
      const seconds = Math.ceil(leftMs / 1000)
      log('warn', `${address} can not be reached: ${error.message} Trying for ${seconds} s more.`)
    }
    return reconnectDelayMs(++this.#failures, Math.random())
  }
}

const noWelcome = (address: string) =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `${address} did not welcome the worker within ${attemptMs / 1000} s.`,
  )

const streamEnded = () =>
  new TunemeshError('COORDINATOR_UNREACHABLE', 'The coordinator ended the stream.')
