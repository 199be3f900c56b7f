/** Workers that join by TLS, as from another host: real processes, another address of loopback. */
import assert from 'node:assert/strict'
import { readFileSync, rmSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { JoinedHost } from '../../client/joined-host.js'
import { addressIn, attached, JoinedWorker, joinLineOf } from './joined-worker.js'
import { type CoordinatorOptions, TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { TcpForward } from './tcp-forward.js'

const listen = '127.0.0.2:0'

async function toEnd({ client }: TestCoordinator, jobId: string): Promise<string> {
  for await (const _event of client.watch(jobId));
  const { state, error, weightsSha256 } = await client.get(jobId)
  assert.deepEqual([state, error], ['SUCCEEDED', null])
  return weightsSha256
}

function natsPortOf({ stateDir }: TestCoordinator): number {
  const secrets = readFileSync(join(stateDir, 'nats', 'secrets.json'), 'utf8')
  return (JSON.parse(secrets) as { port: number }).port
}

/** Whose work the steps of a job count, as its events tell. */
async function whoWorked({ client }: TestCoordinator, jobId: string): Promise<string[]> {
  const ids = new Set<string>()
  for await (const { step } of client.watch(jobId)) {
    for (const { workerId, numMicroBatches } of step?.shares ?? []) {
      if (numMicroBatches > 0) ids.add(workerId)
    }
  }
  return [...ids].sort()
}

describe('workers that join by TLS', { timeout: 240_000 }, () => {
  const folder = temporaryFolder()
  const job = (name: string) => tinyJob(join(folder, name), { gradient_accumulation_steps: 8 })
  const workers: JoinedWorker[] = []
  let expected = ''
  let coordinator: TestCoordinator

  const open = async (options: CoordinatorOptions = {}) => {
    coordinator = await TestCoordinator.open({ listen, ...options })
    return coordinator
  }
  const joinAnother = async () => {
    const { url, token } = await coordinator.client.newToken({ ttlMs: 60_000, uses: 1 })
    const worker = new JoinedWorker(url, token)
    workers.push(worker)
    return worker
  }

  before(async () => {
    const plain = await TestCoordinator.open({ workers: 1 })
    const { jobId } = await plain.client.submit(job('plain'))
    expected = await toEnd(plain, jobId)
    await plain.close()
    plain.removeState()
  })
  after(async () => {
    await Promise.all(workers.map((worker) => worker.leave()))
    await coordinator.close()
    coordinator.removeState()
    for (const { stateDir } of workers) rmSync(stateDir, { recursive: true, force: true })
    rmSync(folder, { recursive: true, force: true })
  })

  it('train to the same bits as one on loopback, beside one of the coordinator', async () => {
    await open({ workers: 1 })
    await joinAnother()
    await joinAnother()
    const ids = await attached(coordinator, 3)
    const { jobId } = await coordinator.client.submit(job('joined'))
    assert.equal(await toEnd(coordinator, jobId), expected)
    assert.deepEqual(await whoWorked(coordinator, jobId), ids)
  })

  it('keep key and certificate in a file that only their user reads', () => {
    for (const { stateDir } of workers) {
      const path = JoinedHost.pathFor(stateDir, addressIn(joinLineOf(coordinator)))
      assert.equal(statSync(path).mode & 0o777, 0o600)
      assert.match(readFileSync(path, 'utf8'), /PRIVATE KEY/)
    }
  })

  it('start again without a token, and with the one that they have used', async () => {
    const [first, second] = workers
    assert.ok(first && second)
    const { url, token } = joinLineOf(coordinator)
    for (const worker of [first, second]) assert.equal((await worker.leave()).code, 0)
    await attached(coordinator, 1)
    workers[0] = new JoinedWorker(url, null, first.stateDir)
    workers[1] = new JoinedWorker(url, token, second.stateDir)
    await attached(coordinator, 3)
    // It had a certificate and did not need the token, which another host can still use.
    const another = new JoinedWorker(url, token)
    await attached(coordinator, 4)
    await another.leave()
    rmSync(another.stateDir, { recursive: true, force: true })
    await attached(coordinator, 3)
  })

  it('reach both ports by an address unknown to the coordinator, as behind NAT', async () => {
    const { url, token } = await coordinator.client.newToken({ ttlMs: 60_000, uses: 1 })
    const commands = await TcpForward.open('127.0.0.3', '127.0.0.2', Number(new URL(url).port))
    const worker = new JoinedWorker(url.replace('127.0.0.2', '127.0.0.3'), token)
    await worker.process.until(/is its port open\? nats-server at nats:\/\/127\.0\.0\.3:/)
    const gradients = await TcpForward.open('127.0.0.3', '127.0.0.2', natsPortOf(coordinator))
    const ids = await attached(coordinator, 4)
    const { jobId } = await coordinator.client.submit(job('forwarded'))
    for await (const { step } of coordinator.client.watch(jobId)) if (step?.step === 3) break
    for (const link of [commands, gradients]) link.cut()
    assert.equal(await toEnd(coordinator, jobId), expected)
    assert.deepEqual(await whoWorked(coordinator, jobId), ids)
    await worker.leave()
    for (const link of [commands, gradients]) await link.close()
    rmSync(worker.stateDir, { recursive: true, force: true })
    await attached(coordinator, 3)
  })

  it('go on with a job after kill -9 of the coordinator, under their ids', async () => {
    const before = await attached(coordinator, 3)
    const { jobId } = await coordinator.client.submit(job('killed'))
    for await (const { step } of coordinator.client.watch(jobId)) if (step?.step === 3) break
    const { url } = joinLineOf(coordinator)
    await coordinator.kill()
    await open({ workers: 1, stateDir: coordinator.stateDir })
    assert.equal(joinLineOf(coordinator).url, url)
    assert.equal(await toEnd(coordinator, jobId), expected)
    const now = await attached(coordinator, 3)
    // The coordinator's own worker is a new process.
    assert.equal(now.filter((id) => before.includes(id)).length, 2)
  })
})
