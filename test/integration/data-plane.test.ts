import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createServer } from 'node:net'
import { test } from 'node:test'
import { isFrame, readFrameHeader } from '../../proto/frame.js'
import { type GradientTransport, NatsConnection } from '../../worker/nats-connection.js'
import { Crew, gradientLike } from '../unit/exchange-fixture.js'
import { natsBinary } from './open-nats.js'

async function freePort(): Promise<number> {
  const probe = createServer().listen(0, '127.0.0.1')
  await once(probe, 'listening')
  const { port } = probe.address() as { port: number }
  probe.close()
  await once(probe, 'close')
  return port
}

const serverPath = await natsBinary()
const withServer = { timeout: 60_000 }

class Server {
  #child: ChildProcess | null = null
  private constructor(readonly port: number) {}

  static async start(): Promise<Server> {
    const server = new Server(await freePort())
    server.run()
    return server
  }
  get url(): string {
    return `nats://127.0.0.1:${this.port}`
  }
  run(): void {
    const options = ['-a', '127.0.0.1', '-p', String(this.port)]
    this.#child = spawn(serverPath, options, { stdio: 'ignore' })
  }
  async kill(): Promise<void> {
    const child = this.#child
    if (child === null || child.exitCode !== null || child.signalCode !== null) return
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
}

const numBlocks = 4096
const gradients = [1, 2, 3].map((seed) => gradientLike(numBlocks * 256, seed))

async function alone() {
  const connect = () => Promise.reject(new Error('one worker alone opened a connection'))
  const crew = new Crew({ numWorkers: 1, numBlocks, connect }, gradients.length)
  crew.openEpoch(1)
  const digests = await crew.step(1, gradients)
  const published = crew.members[0]?.trial.published(1)
  await crew.close()
  return { digests, published }
}

/** Three workers with a connection each; `disturb` may touch every frame before it is published. */
async function together(server: Server, disturb: (frame: Uint8Array) => Uint8Array) {
  const connections: NatsConnection[] = []
  const connect = async (): Promise<GradientTransport> => {
    const connection = await NatsConnection.open({
      url: server.url,
      user: 'worker',
      credentials: null,
    })
    connections.push(connection)
    return {
      publish: (subject, data, reply) =>
        connection.publish(subject, isFrame(data) ? disturb(data) : data, reply),
      subscribe: (subject, listener) => connection.subscribe(subject, listener),
      flush: () => connection.flush(),
      onStatus: (listener) => connection.onStatus(listener),
    }
  }
  const crew = new Crew({ numWorkers: 3, numBlocks, connect })
  const close = async () => {
    await crew.close()
    for (const connection of connections) await connection.close()
    await server.kill()
  }
  crew.openEpoch(1)
  return { crew, close }
}

test(
  'data plane: 3 workers over nats-server get the bits of one worker alone',
  withServer,
  async (t) => {
    const expected = await alone()
    const { crew, close } = await together(await Server.start(), (frame) => frame)
    t.after(close)
    for (const step of [1, 2]) {
      assert.deepEqual(await crew.step(step, gradients), expected.digests)
      for (const { trial } of crew.members)
        assert.deepEqual(trial.published(step), expected.published)
    }
    const received = crew.members.map(({ plane }) => plane.counts.bytesReceived)
    const perWorker = (2 * (2 + 2) * numBlocks * 256 * 3.5) / 3
    assert.ok(Math.max(...received) < perWorker, `${received} bytes received, at most ${perWorker}`)
  },
)

test(
  'data plane: nats-server is killed and started again mid-transfer; the bits are the same',
  withServer,
  async (t) => {
    const expected = await alone()
    const server = await Server.start()
    const countdowns = [9, 40]
    let numFrames = 0
    const disturb = (frame: Uint8Array) => {
      if (++numFrames === countdowns[0]) {
        countdowns.shift()
        void server.kill().then(() => server.run())
      }
      return frame
    }
    const { crew, close } = await together(server, disturb)
    t.after(close)
    for (const step of [1, 2]) assert.deepEqual(await crew.step(step, gradients), expected.digests)
    assert.deepEqual(countdowns, [])
  },
)

test(
  'data plane: a flipped bit is refused and the frame asked for again',
  withServer,
  async (t) => {
    const expected = await alone()
    const flipped = { contribution: false, sum: false }
    const disturb = (frame: Uint8Array) => {
      const { kind } = readFrameHeader(frame)
      if (flipped[kind]) return frame
      flipped[kind] = true
      const copy = Uint8Array.from(frame)
      copy[copy.byteLength - 9] = (copy[copy.byteLength - 9] ?? 0) ^ 4
      return copy
    }
    const { crew, close } = await together(await Server.start(), disturb)
    t.after(close)
    assert.deepEqual(await crew.step(1, gradients), expected.digests)
    // The contribution at its owner, the sum at both other workers.
    const refused = crew.members.reduce((sum, { plane }) => sum + plane.counts.framesRefused, 0)
    assert.equal(refused, 3)
  },
)
