import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import * as grpc from '@grpc/grpc-js'
import type { Hello } from '../../proto/gen/tunemesh/v1/Hello.js'
import { errorOfRpc } from '../../proto/rpc-error.js'
import { channelOptions, WorkerService } from '../../proto/services.js'
import { version } from '../../proto/version.js'
import { TestCoordinator } from './open-coordinator.js'
import { engineMissing } from './temporary-mesh.js'
import { WorkerProcess } from './worker-process.js'

describe('a worker that does not belong here', { timeout: 60_000 }, () => {
  let coordinator: TestCoordinator

  before(async () => {
    coordinator = await TestCoordinator.open()
  })
  after(async () => {
    await coordinator.close()
    coordinator.removeState()
  })

  /** What the coordinator answers to a Hello: an error, or a Welcome. */
  function answerTo(hello: Hello): Promise<Error | 'welcome'> {
    const { grpc: address, token } = coordinator.ready
    const client = new WorkerService(address, grpc.credentials.createInsecure(), channelOptions)
    const metadata = new grpc.Metadata()
    metadata.set('authorization', `Bearer ${token}`)
    return new Promise<Error | 'welcome'>((resolve) => {
      const call = client.attach(metadata)
      call.on('error', (error) => resolve(errorOfRpc(error)))
      call.on('data', () => {
        resolve('welcome')
        call.cancel()
      })
      call.write({ hello })
    }).finally(() => client.close())
  }

  test('another version is refused, and both versions are named', async () => {
    const error = (await answerTo({ version: '0.0.1', host: 'anvil' })) as Error & { code: string }
    assert.equal(error.code, 'VERSION_MISMATCH')
    assert.match(error.message, /anvil runs tunemesh 0\.0\.1, the coordinator/)
    assert.ok(error.message.includes(version))
    assert.equal(await answerTo({ version, host: 'anvil' }), 'welcome')
  })

  test('what only a person can mend ends it at once', { skip: engineMissing() }, async () => {
    const worker = new WorkerProcess(coordinator, { token: 'a wrong token' })
    assert.equal(await worker.ended, 1)
    assert.match(worker.stderr, /NOT_AUTHENTICATED/)
    assert.deepEqual(worker.workFolders(), [])
    worker.removeFolder()
  })
})
