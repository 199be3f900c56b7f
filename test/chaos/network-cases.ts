/**
 * Faults of the network between hosts, on namespaces of the kernel: each trains on a worker of
 * another host and must end with the weights of a worker here.
 */
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { type AddressInfo, createServer, type Server } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import type { JobEvent } from '../../client/client.js'
import { DelayingRelay } from '../integration/delaying-relay.js'
import {
  NetworkNamespace,
  namespacesMissing,
  natMissing,
} from '../integration/network-namespace.js'
import { RemoteMesh } from '../integration/remote-mesh.js'

export interface NetworkCase {
  name: string
  /** Why it can not run here; false: it can. */
  missing(): string | false
  /** Answers what was seen; throws where it went wrong. */
  run(): Promise<string>
}

const outageMs = 20_000
const settings = { max_steps: 60, gradient_accumulation_steps: 2, save_steps: 20 }

export const networkCases: NetworkCase[] = [
  { name: 'network-down-behind-nat', missing: natMissing, run: () => downFor20s(true) },
  { name: 'network-down-others-go-on', missing: namespacesMissing, run: rejoins },
  { name: 'network-20-ms-delay', missing: namespacesMissing, run: slowly },
  { name: 'network-gradients-port-closed', missing: namespacesMissing, run: halfOpen },
]

/** The only worker loses its link in the middle of a job, and comes back. */
async function downFor20s(isBehindNat: boolean): Promise<string> {
  const namespace = NetworkNamespace.open({ isBehindNat })
  const mesh = await RemoteMesh.open(namespace.hostAddress)
  try {
    const undisturbed = await trainHere(mesh)
    const worker = mesh.joinFrom(namespace.wrapper, 'elsewhere', joinArgs(mesh.joinLine))
    let isOver: Promise<void> | null = null
    const weights = await mesh.train(await mesh.submit(settings), ({ step }) => {
      if (step?.step === 3) isOver = outage(namespace, outageMs)
    })
    await isOver
    assert.equal(weights, undisturbed)
    return /attached again after [\d.]+ s/.exec(worker.stderr)?.[0] ?? 'it was not away'
  } finally {
    await mesh.close()
    namespace.close()
  }
}

/** One of two is away so long that it is declared dead; the other goes on, and it joins again. */
async function rejoins(): Promise<string> {
  const namespace = NetworkNamespace.open()
  const mesh = await RemoteMesh.open(namespace.hostAddress)
  try {
    const startedMs = performance.now()
    await trainHere(mesh)
    const stepMs = (performance.now() - startedMs) / settings.max_steps
    // It goes on for as long again after the outage, for the other to find its way back.
    const longer = { ...settings, max_steps: Math.ceil((2.5 * outageMs) / stepMs) }
    const here = mesh.startHere()
    const worker = mesh.joinFrom(namespace.wrapper, 'elsewhere', joinArgs(mesh.joinLine))
    await attached(mesh, 2)
    const fleets: number[] = []
    let isOver: Promise<void> | null = null
    const weights = await mesh.train(await mesh.submit(longer), (event: JobEvent) => {
      if (event.fleet) fleets.push(event.fleet.workers.length)
      if (event.fleet?.workers.length === 2) isOver ??= outage(namespace, outageMs)
    })
    await isOver
    for (const { child } of [here, worker]) child.kill('SIGTERM')
    await attached(mesh, 0)
    assert.equal(await trainHere(mesh, longer), weights)
    const last = fleets.lastIndexOf(1)
    assert.ok(last >= 0 && fleets.slice(last).includes(2), `fleets of ${fleets}`)
    return `fleets of ${fleets.join(', ')} workers`
  } finally {
    await mesh.close()
    namespace.close()
  }
}

/** Each packet of gRPC and NATS takes 20 ms longer, each way. */
async function slowly(): Promise<string> {
  const mesh = await RemoteMesh.open('127.0.0.1', await freePorts())
  const relay = await DelayingRelay.open({
    url: mesh.joinLine.url,
    host: '127.0.0.77',
    delayMs: 20,
  })
  try {
    const short = { ...settings, max_steps: 20 }
    const undisturbed = await trainHere(mesh, short)
    mesh.startHere()
    mesh.joinFrom([], 'elsewhere', joinArgs({ ...mesh.joinLine, url: relay.url }))
    await attached(mesh, 2)
    const startedMs = performance.now()
    assert.equal(await mesh.train(await mesh.submit(short)), undisturbed)
    const perStepMs = (performance.now() - startedMs) / short.max_steps
    assert.ok(relay.numBytes > 0)
    return `${perStepMs.toFixed(0)} ms a step, ${(relay.numBytes / 2 ** 20).toFixed(1)} MiB relayed`
  } finally {
    await mesh.close()
    await relay.close()
  }
}

/** A firewall that lets gRPC through and NATS not: told by name, before a model is fetched. */
async function halfOpen(): Promise<string> {
  const mesh = await RemoteMesh.open('127.0.0.1', await freePorts())
  const { url } = mesh.joinLine
  const relay = await DelayingRelay.open({ url, host: '127.0.0.78', delayMs: 0, numPorts: 1 })
  try {
    const worker = mesh.joinFrom([], 'elsewhere', joinArgs({ ...mesh.joinLine, url: relay.url }))
    await attached(mesh, 1)
    const jobId = await mesh.submit(settings)
    for await (const _ of mesh.client.watch(jobId));
    const { state, error } = await mesh.client.get(jobId)
    assert.deepEqual([state, error?.code], ['FAILED', 'NATS_UNREACHABLE'])
    assert.doesNotMatch(worker.stderr, /fetching/)
    return error?.message ?? ''
  } finally {
    await mesh.close()
    await relay.close()
  }
}

const joinArgs = ({ url, token }: { url: string; token: string }) => [
  '--join',
  url,
  '--token',
  token,
]

async function trainHere(mesh: RemoteMesh, job = settings): Promise<string> {
  const here = mesh.startHere()
  const weights = await mesh.train(await mesh.submit(job))
  here.child.kill('SIGTERM')
  assert.equal((await here.ended).code, 0, here.stderr)
  await attached(mesh, 0)
  return weights
}

async function outage(namespace: NetworkNamespace, ms: number): Promise<void> {
  namespace.setLink(false)
  await delay(ms)
  namespace.setLink(true)
}

/** A port that is free together with the next one, as far as anybody can know. */
async function freePorts(): Promise<number> {
  for (let tries = 0; tries < 50; tries++) {
    const first = await listening(0)
    const { port } = first.address() as AddressInfo
    const second = await listening(port + 1).catch(() => null)
    for (const server of [first, second]) server?.close()
    if (second !== null) return port
  }
  throw new Error('no two free ports side by side')
}

async function listening(port: number): Promise<Server> {
  const server = createServer()
  server.listen(port, '127.0.0.1')
  await once(server, 'listening')
  return server
}

/** Resolves when so many workers are attached. */
async function attached(mesh: RemoteMesh, count: number): Promise<void> {
  while ((await mesh.client.listWorkers()).length !== count);
}
