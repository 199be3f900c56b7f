import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, afterEach, before, describe, test } from 'node:test'
import { encodeJoinToken } from '../../proto/join-token.js'
import { CliProcess } from './cli-process.js'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'
import { WorkerProcess } from './worker-process.js'

describe('a worker whose coordinator is not there', {
  skip: engineMissing(),
  timeout: 120_000,
}, () => {
  const outputs = temporaryFolder()
  let coordinator: TestCoordinator
  let worker: WorkerProcess

  before(async () => {
    coordinator = await TestCoordinator.open()
  })
  afterEach(() => worker.discard())
  after(async () => {
    await coordinator.kill()
    coordinator.removeState()
    rmSync(outputs, { recursive: true, force: true })
  })

  /** On the ports that it had. */
  async function openAgain(): Promise<void> {
    const { grpc } = coordinator.ready
    coordinator = await TestCoordinator.open({ stateDir: coordinator.stateDir })
    assert.equal(coordinator.ready.grpc, grpc)
  }

  test('started too early: it says how long it tries, and trains at last', async () => {
    await coordinator.kill()
    worker = new WorkerProcess(coordinator)
    await worker.said(/127\.0\.0\.1:\d+ can not be reached: .* Trying for 600 s more/)
    await openAgain()
    const { jobId } = await coordinator.client.submit(tinyJob(join(outputs, 'early')))
    for await (const _ of coordinator.client.watch(jobId));
    assert.equal((await coordinator.client.get(jobId)).state, 'SUCCEEDED')
  })

  test('away for longer than its patience: it ends and names the coordinator', async () => {
    await coordinator.kill()
    worker = new WorkerProcess(coordinator, { args: ['--give-up-after', '1'] })
    assert.equal(await worker.ended, 1)
    assert.match(worker.stderr, /Trying for 1 s more/)
    assert.match(worker.stderr, /COORDINATOR_UNREACHABLE/)
    await openAgain()
  })

  test('worker --join --token waits for its coordinator; Ctrl-C ends that', async () => {
    worker = new WorkerProcess(coordinator)
    const token = encodeJoinToken({ fingerprint: randomBytes(32), secret: randomBytes(16) })
    const stateDir = temporaryFolder()
    const named = ['--state-dir', stateDir, 'worker', '--join', 'https://127.0.0.1:9']
    const joining = new CliProcess([...named, '--token', token, '--wait', '7200'])
    await joining.until(/127\.0\.0\.1:9 can not be reached: .* Trying for 7200 s\./)
    joining.interrupt()
    const done = await joining.ended
    assert.match(done.stderr, /Interrupted while joining/)
    rmSync(stateDir, { recursive: true, force: true })
  })
})
