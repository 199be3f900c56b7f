import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import * as grpc from '@grpc/grpc-js'
import { packageDefinition } from '../../proto/services.js'
import { TestCoordinator } from './open-coordinator.js'

/** Calls by path: what any client can do that has no types of ours. */
describe('health and reflection', { timeout: 60_000 }, () => {
  let coordinator: TestCoordinator
  let client: grpc.Client

  before(async () => {
    coordinator = await TestCoordinator.open()
    client = new grpc.Client(coordinator.ready.grpc, grpc.credentials.createInsecure())
  })
  after(async () => {
    client.close()
    await coordinator.close()
    coordinator.removeState()
  })

  const raw = (bytes: Buffer) => bytes
  const deadline = () => ({ deadline: Date.now() + 10_000 })

  function authorized(): grpc.Metadata {
    const metadata = new grpc.Metadata()
    metadata.set('authorization', `Bearer ${coordinator.ready.token}`)
    return metadata
  }

  test('the health service says that it serves', async () => {
    const path = '/grpc.health.v1.Health/Check'
    const answer = await new Promise<Buffer | undefined>((resolve, reject) => {
      const done = (error: grpc.ServiceError | null, bytes?: Buffer) =>
        error ? reject(error) : resolve(bytes)
      client.makeUnaryRequest(path, raw, raw, Buffer.alloc(0), authorized(), deadline(), done)
    })
    // HealthCheckResponse.status (field 1) = SERVING (1).
    assert.deepEqual([...(answer ?? [])], [8, 1])
  })

  test('reflection lists the services of the contract', async () => {
    const path = '/grpc.reflection.v1.ServerReflection/ServerReflectionInfo'
    const call = client.makeBidiStreamRequest(path, raw, raw, authorized(), deadline())
    // ServerReflectionRequest.list_services (field 7) = "*".
    call.write(Buffer.from([0x3a, 1, 0x2a]))
    const answer = await new Promise<Buffer>((resolve, reject) => {
      call.once('data', resolve)
      call.once('error', reject)
    })
    call.end()
    const names = Object.keys(packageDefinition).filter((name) => name.endsWith('Service'))
    assert.equal(names.length, 4)
    for (const name of names) assert.ok(answer.includes(name), name)
  })
})
