/** The gRPC server: all services behind one token, on loopback. */
import * as grpc from '@grpc/grpc-js'
import { ReflectionService } from '@grpc/reflection'
import { HealthImplementation } from 'grpc-health-check'
import { TunemeshError } from '../proto/errors.js'
import type { BlobServiceHandlers } from '../proto/gen/tunemesh/v1/BlobService.js'
import type { JobServiceHandlers } from '../proto/gen/tunemesh/v1/JobService.js'
import type { WorkerServiceHandlers } from '../proto/gen/tunemesh/v1/WorkerService.js'
import {
  BlobService,
  JobService,
  packageDefinition,
  serverOptions,
  WorkerService,
} from '../proto/services.js'
import { tokenInterceptor } from './access.js'

export interface GrpcServices {
  jobs: JobServiceHandlers
  workers: WorkerServiceHandlers
  blobs: BlobServiceHandlers
}

export class GrpcServer {
  readonly #server: grpc.Server
  readonly #health: HealthImplementation

  constructor(token: string, services: GrpcServices) {
    this.#server = new grpc.Server({ ...serverOptions, interceptors: [tokenInterceptor(token)] })
    this.#server.addService(JobService.service, services.jobs)
    this.#server.addService(WorkerService.service, services.workers)
    this.#server.addService(BlobService.service, services.blobs)
    this.#health = new HealthImplementation({ '': 'SERVING', 'tunemesh.v1.JobService': 'SERVING' })
    this.#health.addToServer(this.#server)
    new ReflectionService(packageDefinition).addToServer(this.#server)
  }

  /** @returns the bound port. @throws TunemeshError PORT_TAKEN */
  async listen(port: number): Promise<number> {
    return new Promise((resolve, reject) => {
      const credentials = grpc.ServerCredentials.createInsecure()
      this.#server.bindAsync(`127.0.0.1:${port}`, credentials, (cause, bound) => {
        if (cause === null) resolve(bound)
        else reject(portTaken('gRPC', port, cause))
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

export const portTaken = (what: string, port: number, cause: unknown) =>
  new TunemeshError(
    'PORT_TAKEN',
    `Port ${port} for ${what} cannot be opened on 127.0.0.1: ${(cause as Error).message}. ` +
      'Choose another port, or 0 for any free one.',
    { cause },
  )
