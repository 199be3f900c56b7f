/**
 * The worker's one stream to the coordinator. It comes back by itself with capped, jittered delays
 * after a break, names the worker id it had, and keeps no message while it is away.
 */
import { setTimeout as delay } from 'node:timers/promises'
import * as grpc from '@grpc/grpc-js'
import { metadataWith } from '../client/rpc.js'
import { errorKinds, TunemeshError } from '../proto/errors.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { Hello } from '../proto/gen/tunemesh/v1/Hello.js'
import type { ToWorker__Output as ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { Welcome__Output as Welcome } from '../proto/gen/tunemesh/v1/Welcome.js'
import { errorOfRpc } from '../proto/rpc-error.js'
import { WorkerService } from '../proto/services.js'

const firstDelayMs = 100
const maxDelayMs = 2_000
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
    const { credentials, channelOptions, token } = options.access
    this.#metadata = metadataWith(token)
    this.#client = new WorkerService(options.address, credentials, channelOptions)
  }

  /**
   * Resolves when closed. Rejects when the coordinator stayed away for `giveUpAfterMs`, and at once
   * when it refused this worker for what only a person can mend: another version, a wrong token.
   */
  async run(): Promise<void> {
    let lastSeenMs = performance.now()
    let delayMs = firstDelayMs
    while (!this.#isClosed) {
      const { error, sawWelcome } = await this.#runOnce()
      if (this.#isClosed) return
      if (errorKinds[error.code].exit === 2) throw error
      // One that was welcomed before goes on trying: what answers now may be gone soon.
      const cause = this.#workerId === '' ? await this.#causeOf(error) : error
      if (errorKinds[cause.code].exit === 2) throw cause
      if (sawWelcome) {
        lastSeenMs = performance.now()
        delayMs = firstDelayMs
        this.options.onBreak(error.message)
      }
      if (performance.now() - lastSeenMs > this.options.giveUpAfterMs) throw error
      const { signal } = this.#closing
      await delay(delayMs * (0.5 + Math.random() / 2), undefined, { signal }).catch(() => {})
      delayMs = Math.min(delayMs * 2, maxDelayMs)
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
      call.on('data', (message: ToWorker) => {
        if (message.welcome) {
          sawWelcome = true
          this.#call = call
          this.#workerId = message.welcome.workerId
          this.#workerProof = message.welcome.workerProof
          this.options.onWelcome(message.welcome)
        } else this.options.onMessage(message)
      })
      const end = (error: TunemeshError) => {
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

const streamEnded = () =>
  new TunemeshError('COORDINATOR_UNREACHABLE', 'The coordinator ended the stream.')
