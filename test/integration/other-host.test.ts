import assert from 'node:assert/strict'
import { after, before, describe, test } from 'node:test'
import { setTimeout as delay } from 'node:timers/promises'
import type { CliProcess } from './cli-process.js'
import { NetworkNamespace, namespacesMissing, natMissing } from './network-namespace.js'
import { RemoteMesh } from './remote-mesh.js'
import { engineMissing } from './temporary-mesh.js'

const skip = engineMissing() || namespacesMissing()
const outageMs = 20_000
const settings = { max_steps: 60, gradient_accumulation_steps: 2, save_steps: 20 }

/** Behind NAT where this machine can make that: nothing reaches the worker from outside. */
describe('workers of another host', { skip, timeout: 180_000 }, () => {
  let namespace: NetworkNamespace
  let mesh: RemoteMesh
  let worker: CliProcess
  let undisturbed = ''

  before(async () => {
    namespace = NetworkNamespace.open({ isBehindNat: !natMissing() })
    mesh = await RemoteMesh.open(namespace.hostAddress)
  })
  after(async () => {
    await mesh?.close()
    namespace?.close()
  })

  const join = (args: string[]) => mesh.joinFrom(namespace.wrapper, 'elsewhere', args)

  test('one joins by its token, fetches the model and trains to the bits of one here', async () => {
    const here = mesh.startHere()
    undisturbed = await mesh.train(await mesh.submit(settings))
    here.child.kill('SIGTERM')
    assert.equal((await here.ended).code, 0, here.stderr)

    const { url, token } = mesh.joinLine
    worker = join(['--join', url, '--token', token])
    assert.equal(await mesh.train(await mesh.submit(settings)), undisturbed)
    assert.match(worker.stderr, /fetching 4 files/)
    const [told] = await mesh.client.listWorkers()
    assert.equal(told?.host, 'elsewhere')
    assert.notEqual(told?.hostId, '')
  })

  test('their link is down for 20 s: one goes on, one asked to leave leaves', async () => {
    // The host has joined: its certificate speaks for it.
    const second = join(['--join', mesh.joinLine.url])
    const before = await fleetOf(2)
    let isOver: Promise<void> | null = null
    const weights = await mesh.train(await mesh.submit(settings), ({ step }) => {
      if (step?.step === 3) isOver = outage(second)
    })
    await isOver
    assert.equal(weights, undisturbed)
    const [survivor] = await mesh.client.listWorkers()
    assert.ok(before.includes(survivor?.workerId ?? ''))
    assert.match(worker.stderr, /attached again after \d+/)
  })

  async function outage(second: CliProcess): Promise<void> {
    namespace.setLink(false)
    second.interrupt()
    const over = delay(outageMs)
    const drained = await second.ended
    assert.equal(drained.code, 0, drained.stderr)
    await over
    namespace.setLink(true)
  }

  async function fleetOf(count: number): Promise<string[]> {
    for (;;) {
      const workers = await mesh.client.listWorkers()
      if (workers.length === count) return workers.map(({ workerId }) => workerId)
    }
  }
})
