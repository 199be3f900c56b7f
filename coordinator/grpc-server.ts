/** A gRPC server with all services: one on loopback, and one behind TLS where others may join. */
import * as grpc from '@grpc/grpc-js'
import { ReflectionService } from '@grpc/reflection'
import { HealthImplementation } from 'grpc-health-check'
import { TunemeshError } from '../proto/errors.js'
import type { BlobServiceHandlers } from '../proto/gen/tunemesh/v1/BlobService.js'
import type { JobServiceHandlers } from '../proto/gen/tunemesh/v1/JobService.js'
import type { JoinServiceHandlers } from '../proto/gen/tunemesh/v1/JoinService.js'
import type { WorkerServiceHandlers } from '../proto/gen/tunemesh/v1/WorkerService.js'
import {
  BlobService,
  JobService,
  JoinService,
  packageDefinition,
  serverOptions,
  WorkerService,
} from '../proto/services.js'
import { inAddress } from '../proto/tls.js'

export interface GrpcServices {
  jobs: JobServiceHandlers
  workers: WorkerServiceHandlers
  blobs: BlobServiceHandlers
  joins: JoinServiceHandlers
}

export class GrpcServer {
  readonly #server: grpc.Server
  readonly #health: HealthImplementation

  /** @param access refuses calls of all services, health and reflection included */
  constructor(access: grpc.ServerInterceptor, services: GrpcServices) {
    this.#server = new grpc.Server({ ...serverOptions, interceptors: [access] })
    this.#server.addService(JobService.service, services.jobs)
    this.#server.addService(WorkerService.service, services.workers)
    this.#server.addService(BlobService.service, services.blobs)
    this.#server.addService(JoinService.service, services.joins)
    this.#health = new HealthImplementation({ '': 'SERVING', 'tunemesh.v1.JobService': 'SERVING' })
    this.#health.addToServer(this.#server)
    new ReflectionService(packageDefinition).addToServer(this.#server)
  }

  /** @returns the bound port. @throws TunemeshError PORT_TAKEN */
  async listen(
    address: { host: string; port: number },
    credentials = grpc.ServerCredentials.createInsecure(),
  ): Promise<number> {
    const { host, port } = address
    return new Promise((resolve, reject) => {
      this.#server.bindAsync(`${inAddress(host)}:${port}`, credentials, (cause, bound) => {
        if (cause === null) resolve(bound)
        else reject(portTaken('gRPC', address, cause))
      })
    })
  }

  /** New calls are refused, those under way may end for a moment. */
  async close(graceMs: number): Promise<void> {
    this.#health.setStatus('', 'NOT_SERVING')
    await new Promise<void>((resolve) => {
      const timer = setTimeout(() => {
        this.#server.forceShutdown()
        resolve()
      }, graceMs)
      this.#server.tryShutdown(() => {
        clearTimeout(timer)
        resolve()
      })
    })
  }
}

export const portTaken = (
  what: string,
  { host, port }: { host: string; port: number },
  cause: unknown,
) =>
  new TunemeshError(
    'PORT_TAKEN',
    `Port ${port} for ${what} cannot be opened on ${host}: ${(cause as Error).message}. ` +
      'Choose another port, or 0 for any free one.',
    { cause },
  )
