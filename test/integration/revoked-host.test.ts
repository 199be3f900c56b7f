/** A joined host that its owner puts out: what it has open ends, and nothing is taken from it. */
import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { after, before, describe, it } from 'node:test'
import { joinMesh } from '../../client/join.js'
import type { JoinedHost } from '../../client/joined-host.js'
import { connectNats, type NatsAddress } from '../../proto/nats-client.js'
import { attachOnce } from './attach-once.js'
import { runCli } from './cli-process.js'
import { addressIn, attached, JoinedWorker, joinLineOf, refusal } from './joined-worker.js'
import { TestCoordinator } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'

const listen = '127.0.0.2:0'
const limits = { ttlMs: 3_600_000, uses: 1 }

async function disconnected(client: Awaited<ReturnType<typeof connectNats>>): Promise<void> {
  for await (const { type } of client.status()) if (type === 'disconnect') return
}

describe('a host that is revoked', { skip: engineMissing(), timeout: 180_000 }, () => {
  const stateDir = temporaryFolder()
  const folders = [stateDir]
  let coordinator: TestCoordinator
  let address = ''

  const newFolder = () => {
    const folder = temporaryFolder()
    folders.push(folder)
    return folder
  }
  const joinAs = async (hostName: string): Promise<JoinedHost> => {
    const { token } = await coordinator.client.newToken(limits)
    return joinMesh({ address, token, hostName, stateDir: newFolder(), nowMs: Date.now() })
  }
  /** By the credentials of an attached worker. */
  const openBus = async (identity: JoinedHost, host: string) => {
    const { natsUrl: url, nats, workerId: user } = await attachOnce(address, identity, { host })
    assert.ok(nats !== null)
    const told: NatsAddress = { url, user, credentials: nats, tls: identity }
    const open = () => connectNats(() => told, { timeoutMs: 1, noEcho: true })
    return { client: await connectNats(() => told, { timeoutMs: 10_000, noEcho: true }), open }
  }

  before(async () => {
    coordinator = await TestCoordinator.open({ listen, stateDir })
    address = addressIn(joinLineOf(coordinator))
  })
  after(async () => {
    await coordinator.close()
    for (const folder of folders) rmSync(folder, { recursive: true, force: true })
  })

  it('is told so on its stream and ends; a fresh token lets it in as another', async () => {
    const folder = newFolder()
    const { url, token } = await coordinator.client.newToken(limits)
    const worker = new JoinedWorker(url, token, folder)
    await attached(coordinator, 1)
    const [{ hostId = '', host = '' } = {}] = await coordinator.client.listWorkers()
    const done = await runCli(['fleet', '--state-dir', stateDir, '--revoke', hostId, '--json'])
    assert.equal(done.code, 0, done.stderr)
    assert.deepEqual(
      (({ type, hostId, numWorkers }) => ({ type, hostId, numWorkers }))(JSON.parse(done.stdout)),
      { type: 'revoked', hostId, numWorkers: 1 },
    )
    assert.match(await refusal(worker), /HOST_REVOKED .*was revoked.*tunemesh token/)
    const [gone] = await coordinator.client.listWorkers({ withGone: true })
    assert.deepEqual([gone?.host, gone?.goneReason], [host, 'its host was revoked'])
    // It has forgotten what counts no more, and its old token is used up.
    assert.match(await refusal(new JoinedWorker(url, token, folder)), /JOIN_REFUSED.*used already/)
    const fresh = await coordinator.client.newToken(limits)
    const again = new JoinedWorker(url, fresh.token, folder)
    await attached(coordinator, 1)
    const [back] = await coordinator.client.listWorkers()
    assert.notEqual(back?.hostId, hostId)
    await again.leave()
  })

  it('joins by a newer token where it was revoked while it was off', async () => {
    const folder = newFolder()
    const first = await coordinator.client.newToken(limits)
    const worker = new JoinedWorker(first.url, first.token, folder)
    await attached(coordinator, 1)
    const [{ hostId = '' } = {}] = await coordinator.client.listWorkers()
    await worker.leave()
    await coordinator.client.revokeHost(hostId)
    const { url, token } = await coordinator.client.newToken(limits)
    const again = new JoinedWorker(url, token, folder)
    await attached(coordinator, 1)
    await again.leave()
  })

  it('loses the bus, where others stay, and after a restart of the coordinator too', async () => {
    const [host, other] = [await joinAs('anvil'), await joinAs('bellows')]
    const [bus, others] = [await openBus(host, 'anvil'), await openBus(other, 'bellows')]
    const cut = disconnected(bus.client)
    await coordinator.client.revokeHost('anvil')
    await cut
    const refused = { message: /refuses the credentials/ }
    await assert.rejects(bus.open(), refused)
    await others.client.flush()
    await Promise.all([others.client.close(), bus.client.close()])
    await assert.rejects(attachOnce(address, host), { code: 'HOST_REVOKED' })
    await assert.rejects(host.renewIfDue(Date.now() + 1e10), { code: 'HOST_REVOKED' })
    await coordinator.close()
    coordinator = await TestCoordinator.open({ listen, stateDir })
    await assert.rejects(attachOnce(address, host), { code: 'HOST_REVOKED' })
    await assert.rejects(bus.open(), refused)
    await (await others.open()).close()
    assert.match((await attachOnce(address, other)).workerId, /^w-/)
  })

  it('must be named so that one is meant', async () => {
    const [one, two] = [await joinAs('twin'), await joinAs('twin')]
    const invalid = (message: RegExp) => ({ code: 'JOB_INVALID', message })
    const { client } = coordinator
    await assert.rejects(client.revokeHost('twin'), invalid(/names 2 hosts: h-\w+, h-\w+/))
    await assert.rejects(client.revokeHost('h-'), invalid(/No host "h-" has joined/))
    const { hostId } = await client.revokeHost(one.hostId.slice(0, 12))
    assert.equal(hostId, one.hostId)
    assert.equal((await client.revokeHost('twin')).hostId, two.hostId)
    assert.equal((await client.revokeHost(one.hostId)).hostId, one.hostId)
  })
})
