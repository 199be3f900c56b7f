/**
 * The typed client of a coordinator: what the command line and other programs import.
 *
 * Every call has a deadline and fails with a TunemeshError. Calls that may be sent twice are sent
 * again by retry.ts while the failure is one that passes; the others are sent once.
 */
import { randomUUID } from 'node:crypto'
import { credentials } from '@grpc/grpc-js'
import { TunemeshError } from '../proto/errors.js'
import type { GenerateRequest } from '../proto/gen/tunemesh/v1/GenerateRequest.js'
import type { GenerateResponse__Output } from '../proto/gen/tunemesh/v1/GenerateResponse.js'
import type { Job__Output } from '../proto/gen/tunemesh/v1/Job.js'
import type { JobEvent__Output } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { JobServiceClient } from '../proto/gen/tunemesh/v1/JobService.js'
import type { ListJobsResponse__Output } from '../proto/gen/tunemesh/v1/ListJobsResponse.js'
import type { ListWorkersResponse__Output } from '../proto/gen/tunemesh/v1/ListWorkersResponse.js'
import type { PlanRequest } from '../proto/gen/tunemesh/v1/PlanRequest.js'
import type { PlanResponse__Output } from '../proto/gen/tunemesh/v1/PlanResponse.js'
import type { RevokeHostResponse__Output } from '../proto/gen/tunemesh/v1/RevokeHostResponse.js'
import type { SubmitRequest } from '../proto/gen/tunemesh/v1/SubmitRequest.js'
import type { WorkerInfo__Output } from '../proto/gen/tunemesh/v1/WorkerInfo.js'
import { BlobService, channelOptions, JobService, JoinService } from '../proto/services.js'
import { Blobs } from './blobs.js'
import { tlsChannelOptions } from './joined-host.js'
import { realSurroundings, type Surroundings, withRetries } from './retry.js'
import { callOnce, readStream, type StartUnary } from './rpc.js'
import { type WatchOptions, watchEvents } from './watch.js'

export type Job = Job__Output
export type JobEvent = JobEvent__Output
export type Plan = PlanResponse__Output
export type WorkerInfo = WorkerInfo__Output

/** What a worker of another host needs to join. */
export interface JoinLine {
  url: string
  token: string
  /** Wall clock. */
  expiresMs: number
}

export interface ConnectOptions {
  /** "127.0.0.1:8471" */
  address: string
  token: string
  /** PEM of the mesh's authority; required for an address that is not on this machine. */
  tlsRoots?: Buffer | undefined
  surroundings?: Surroundings
}

const deadlines = {
  quickMs: 10_000,
  /** Validation reads the whole job file and looks at the model folder. */
  submitMs: 60_000,
  /** Plan reads, tokenises and packs the data. */
  planMs: 10 * 60_000,
  generateMs: 10 * 60_000,
  /** A healthy watch is opened again this often; the cursor makes that invisible. */
  watchMs: 30 * 60_000,
}

export class TunemeshClient {
  readonly blobs: Blobs
  readonly #jobs: JobServiceClient
  readonly #joins: InstanceType<typeof JoinService>
  readonly #blobService: InstanceType<typeof BlobService>
  readonly #surroundings: Surroundings

  constructor(readonly options: ConnectOptions) {
    const channel = credentialsFor(options)
    const channelLimits = options.tlsRoots ? tlsChannelOptions : channelOptions
    this.#jobs = new JobService(options.address, channel, channelLimits)
    this.#joins = new JoinService(options.address, channel, channelLimits)
    this.#blobService = new BlobService(options.address, channel, channelLimits)
    this.#surroundings = options.surroundings ?? realSurroundings
    this.blobs = new Blobs(this.#blobService, options.token)
  }

  /** Retried under one idempotency key: however often it is sent, it makes one job. */
  submit(request: SubmitRequest): Promise<Job> {
    const keyed = { ...request, idempotencyKey: request.idempotencyKey || randomUUID() }
    return this.#idempotent((m, o, done) => this.#jobs.submit(keyed, m, o, done), {
      deadlineMs: deadlines.submitMs,
    })
  }

  get(jobId: string): Promise<Job> {
    return this.#idempotent((m, o, done) => this.#jobs.get({ jobId }, m, o, done))
  }

  async list(limit = 50): Promise<Job[]> {
    const start: StartUnary<ListJobsResponse__Output> = (m, o, done) =>
      this.#jobs.list({ limit }, m, o, done)
    return (await this.#idempotent(start)).jobs
  }

  stop(jobId: string, options: { now?: boolean } = {}): Promise<Job> {
    const request = { jobId, now: options.now ?? false }
    return this.#idempotent((m, o, done) => this.#jobs.stop(request, m, o, done))
  }

  resume(jobId: string): Promise<Job> {
    return this.#idempotent((m, o, done) => this.#jobs.resume({ jobId }, m, o, done))
  }

  /** Changes nothing, but may take minutes of a worker: sent once. */
  plan(request: PlanRequest): Promise<Plan> {
    return callOnce((m, o, done) => this.#jobs.plan(request, m, o, done), {
      token: this.options.token,
      deadlineMs: deadlines.planMs,
    })
  }

  /** The fleet; with `withGone` also workers that have left in the last ten minutes. */
  async listWorkers(options: { withGone?: boolean } = {}): Promise<WorkerInfo[]> {
    const request = { withGone: options.withGone ?? false }
    const start: StartUnary<ListWorkersResponse__Output> = (m, o, done) =>
      this.#jobs.listWorkers(request, m, o, done)
    return (await this.#idempotent(start)).workers
  }

  /** Another join token; not retried, as each call makes one. */
  newToken(limits: { ttlMs: number; uses: number }): Promise<JoinLine> {
    return callOnce((m, o, done) => this.#joins.newToken(limits, m, o, done), {
      token: this.options.token,
      deadlineMs: deadlines.quickMs,
    })
  }

  /**
   * A joined host's certificates count no more; what it has open is ended.
   * @param host its name, its identity, or the start of that
   */
  revokeHost(host: string): Promise<RevokeHostResponse__Output> {
    return callOnce((m, o, done) => this.#joins.revokeHost({ host }, m, o, done), {
      token: this.options.token,
      deadlineMs: deadlines.quickMs,
    })
  }

  /** One cheap authenticated call, not retried: is there a coordinator that takes our token? */
  async probe(deadlineMs = 2_000): Promise<void> {
    await callOnce((m, o, done) => this.#jobs.list({ limit: 1 }, m, o, done), {
      token: this.options.token,
      deadlineMs,
    })
  }

  /** All events of a job and then the live ones, over reconnects, without gap or duplicate. */
  watch(jobId: string, options: WatchOptions = {}): AsyncGenerator<JobEvent, void, undefined> {
    const context = {
      token: this.options.token,
      deadlineMs: deadlines.watchMs,
      signal: options.signal,
    }
    const followForever = options.followForever ?? false
    const source = {
      open: (afterSequence: number) =>
        readStream(
          (m, o) => this.#jobs.watch({ jobId, afterSequence, followForever }, m, o),
          context,
        ),
      stateNow: async () => (await this.get(jobId)).state,
    }
    return watchEvents(source, { surroundings: this.#surroundings, ...options })
  }

  /** Text piece by piece. Not retried: a second attempt would begin the answer again. */
  generate(
    request: GenerateRequest,
    signal?: AbortSignal,
  ): AsyncGenerator<GenerateResponse__Output, void, undefined> {
    return readStream((m, o) => this.#jobs.generate(request, m, o), {
      token: this.options.token,
      deadlineMs: deadlines.generateMs,
      signal,
    })
  }

  close(): void {
    this.#jobs.close()
    this.#joins.close()
    this.#blobService.close()
  }

  #idempotent<Response>(
    start: StartUnary<Response>,
    { deadlineMs = deadlines.quickMs } = {},
  ): Promise<Response> {
    const attempt = () => callOnce(start, { token: this.options.token, deadlineMs })
    return withRetries(attempt, undefined, this.#surroundings)
  }
}

export const connect = (options: ConnectOptions): TunemeshClient => new TunemeshClient(options)

function credentialsFor(options: ConnectOptions) {
  if (options.tlsRoots) return credentials.createSsl(options.tlsRoots)
  assertLoopback(
    options.address,
    'Give --ca with the file tls/ca.pem of its state folder, or forward',
  )
  return credentials.createInsecure()
}

/**
 * What speaks without TLS goes to this machine only.
 * @throws TunemeshError NOT_AUTHENTICATED
 */
export function assertLoopback(address: string, remedy = 'Forward'): void {
  if (isLoopback(address)) return
  throw new TunemeshError(
    'NOT_AUTHENTICATED',
    `${address} is not on this machine, and the token would travel there in the clear. ` +
      `${remedy} the port with ssh and use 127.0.0.1.`,
  )
}

export function isLoopback(address: string): boolean {
  const host = address.replace(/:\d+$/, '')
  return host === 'localhost' || host === '[::1]' || /^127(\.\d{1,3}){3}$/.test(host)
}
