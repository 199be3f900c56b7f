/** JobService and BlobService over real gRPC, whose answers a test decides: no nats, no engine. */
import { createHash } from 'node:crypto'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import {
  Server,
  ServerCredentials,
  type ServerUnaryCall,
  type ServerWritableStream,
  type sendUnaryData,
} from '@grpc/grpc-js'
import { TunemeshError } from '../../proto/errors.js'
import type { GetBlobRequest__Output } from '../../proto/gen/tunemesh/v1/GetBlobRequest.js'
import type { GetBlobResponse } from '../../proto/gen/tunemesh/v1/GetBlobResponse.js'
import type { Job } from '../../proto/gen/tunemesh/v1/Job.js'
import type { JobEvent } from '../../proto/gen/tunemesh/v1/JobEvent.js'
import type { JobState } from '../../proto/gen/tunemesh/v1/JobState.js'
import type { StopRequest__Output } from '../../proto/gen/tunemesh/v1/StopRequest.js'
import type { SubmitRequest__Output } from '../../proto/gen/tunemesh/v1/SubmitRequest.js'
import type { WatchRequest__Output } from '../../proto/gen/tunemesh/v1/WatchRequest.js'
import { rpcStatusOf } from '../../proto/rpc-error.js'
import { BlobService, JobService, serverOptions } from '../../proto/services.js'

type Unary<Request, Response> = (request: Request) => Response
type Watcher = ServerWritableStream<WatchRequest__Output, JobEvent>

export class MockCoordinator {
  readonly token = 'mock-token'
  address = ''
  job: Job = { jobId: 'j-1', state: 'QUEUED', numSteps: 4, name: 'mock', outputDir: '/out' }
  readonly submits: SubmitRequest__Output[] = []
  readonly stops: StopRequest__Output[] = []
  /** Cursors of all Watch calls: from where clients went on. */
  readonly cursors: number[] = []
  readonly blobs = new Map<string, Buffer>()
  readonly blobOffsets: number[] = []
  /** Thrown by the next Submit. */
  refusal: TunemeshError | null = null
  /** Bytes after which the next Get of a blob breaks off. */
  breakGetAfter: number | null = null
  onSubmit: () => void = () => {}
  onStop: (request: StopRequest__Output) => void = () => {}
  readonly #events: JobEvent[] = []
  readonly #watchers = new Set<Watcher>()
  #server: Server | null = null

  async start(port = 0): Promise<void> {
    const server = new Server(serverOptions)
    server.addService(JobService.service, this.#jobHandlers())
    server.addService(BlobService.service, {
      Get: (call: ServerWritableStream<GetBlobRequest__Output, GetBlobResponse>) =>
        this.#getBlob(call),
    })
    const bound = await new Promise<number>((resolve, reject) => {
      const credentials = ServerCredentials.createInsecure()
      server.bindAsync(`127.0.0.1:${port}`, credentials, (error, got) =>
        error ? reject(error) : resolve(got),
      )
    })
    this.#server = server
    this.address = `127.0.0.1:${bound}`
  }

  /** As a crash: every call breaks. */
  stop(): void {
    this.#server?.forceShutdown()
    this.#watchers.clear()
  }

  async restart(): Promise<void> {
    const port = Number(this.address.split(':')[1])
    this.stop()
    await this.start(port)
  }

  publishEndpoint(stateDir: string, isHeld = false): void {
    mkdirSync(stateDir, { recursive: true })
    const { address: grpc, token } = this
    const endpoint = { grpc, token, dashboard: '', pid: process.pid, isHeld }
    writeFileSync(join(stateDir, 'endpoint.json'), JSON.stringify(endpoint), { mode: 0o600 })
  }

  push(event: JobEvent): void {
    this.#events.push({ ...event, sequence: this.#events.length + 1, jobId: 'j-1', timeMs: 1 })
    const changed = event.stateChanged?.state
    if (changed !== undefined) this.job = { ...this.job, state: changed }
    for (const watcher of this.#watchers) this.#serve(watcher)
  }

  pushState(state: JobState): void {
    this.push({ stateChanged: { state } })
  }

  /** As a proxy or a dying server: some streams end, nothing else is wrong. */
  breakWatches(): void {
    for (const watcher of this.#watchers) {
      watcher.emit('error', { code: 14, details: 'connection dropped' })
    }
    this.#watchers.clear()
  }

  putBlob(data: Buffer): string {
    const digest = `sha256:${createHash('sha256').update(data).digest('hex')}`
    this.blobs.set(digest, data)
    return digest
  }

  #jobHandlers() {
    return {
      Submit: this.#unary<SubmitRequest__Output, Job>((request) => {
        this.submits.push(request)
        const { refusal } = this
        this.refusal = null
        if (refusal) throw refusal
        this.onSubmit()
        return this.job
      }),
      Get: this.#unary<unknown, Job>(() => this.job),
      List: this.#unary<unknown, { jobs: Job[] }>(() => ({ jobs: [this.job] })),
      Stop: this.#unary<StopRequest__Output, Job>((request) => {
        this.stops.push(request)
        this.onStop(request)
        return this.job
      }),
      Resume: this.#unary<unknown, Job>(() => this.job),
      ListWorkers: this.#unary<unknown, object>(() => ({ workers: [] })),
      Watch: (call: Watcher) => this.#watch(call),
    }
  }

  #unary<Request, Response>(answer: Unary<Request, Response>) {
    return (call: ServerUnaryCall<Request, Response>, done: sendUnaryData<Response>) => {
      try {
        if (call.metadata.get('authorization')[0] !== `Bearer ${this.token}`) {
          throw new TunemeshError('NOT_AUTHENTICATED', 'no valid token')
        }
        done(null, answer(call.request))
      } catch (error) {
        done(rpcStatusOf(error))
      }
    }
  }

  #watch(call: Watcher): void {
    this.cursors.push(call.request.afterSequence)
    this.#watchers.add(call)
    call.on('cancelled', () => this.#watchers.delete(call))
    this.#serve(call)
  }

  /** Each watcher remembers in its own request how far it has been served. */
  #serve(call: Watcher): void {
    for (const event of this.#events.slice(call.request.afterSequence)) {
      call.write(event)
      call.request.afterSequence = Number(event.sequence)
    }
    const { state } = this.job
    if (state === 'SUCCEEDED' || state === 'FAILED' || state === 'STOPPED') {
      this.#watchers.delete(call)
      call.end()
    }
  }

  #getBlob(call: ServerWritableStream<GetBlobRequest__Output, GetBlobResponse>): void {
    const { digest, offset } = call.request
    this.blobOffsets.push(offset)
    const data = this.blobs.get(digest)
    if (!data) {
      call.emit('error', rpcStatusOf(new TunemeshError('BLOB_NOT_FOUND', `no ${digest}`)))
      return
    }
    const breakAfter = this.breakGetAfter
    this.breakGetAfter = null
    for (let at = offset; at < data.length; at += 1000) {
      if (breakAfter !== null && at - offset >= breakAfter) {
        call.emit('error', { code: 14, details: 'connection dropped' })
        return
      }
      call.write({ data: data.subarray(at, at + 1000), offset: at, totalBytes: data.length })
    }
    call.end()
  }
}
