import assert from 'node:assert/strict'
import { chmodSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { connect, type NatsConnection } from 'nats'
import {
  accountName,
  type NatsSeeds,
  newSeeds,
  workerUser,
} from '../../coordinator/nats-accounts.js'
import { findNatsServer } from '../../coordinator/nats-binary.js'
import { connectNats, type NatsAddress } from '../../proto/nats-client.js'
import { isNewEnough } from '../../proto/nats-search.js'
import { NatsConnection as WorkerConnection } from '../../worker/nats-connection.js'
import { type NatsFixture, openNats, pidOf, temporaryFolder } from './open-nats.js'

const inAnHour = () => Date.now() + 3_600_000

/** A user that tells what the server refused it. */
class User {
  #refused: string[] = []

  constructor(readonly client: NatsConnection) {
    void this.#follow()
  }

  async publish(subject: string): Promise<string[]> {
    this.client.publish(subject, 'x')
    return this.#answer()
  }

  async subscribe(subject: string): Promise<string[]> {
    const subscription = this.client.subscribe(subject, { callback: () => {} })
    const refused = await this.#answer()
    if (refused.length === 0) subscription.unsubscribe()
    return refused
  }

  /** The server answers in order: what it refused comes before the second pong. */
  async #answer(): Promise<string[]> {
    await this.client.flush()
    await this.client.flush()
    return this.#refused.splice(0)
  }

  async #follow(): Promise<void> {
    for await (const status of this.client.status()) {
      if (status.type !== 'error' || !status.permissionContext) continue
      this.#refused.push(
        `${status.permissionContext.operation} ${status.permissionContext.subject}`,
      )
    }
  }
}

async function openUser(address: NatsAddress): Promise<User> {
  return new User(await connectNats(() => address, { timeoutMs: 10_000, noEcho: false }))
}

describe('nats-server', () => {
  let nats: NatsFixture
  before(async () => {
    nats = await openNats()
  })
  after(() => nats.close())

  it('comes back on the same port with what was stored, after kill -9', async () => {
    const stream = { name: 'KEPT', subjects: ['kept.*'] }
    await nats.connection.ensureStream(stream)
    const first = await nats.connection.append('kept.a', new TextEncoder().encode('1'), 0)
    assert.equal(first.outcome, 'ok')
    const { url } = nats.server
    const pid = pidOf(nats)
    const isBack = new Promise<void>((resolve) => {
      const off = nats.connection.onStatus((isUp) => {
        if (!isUp) return
        off()
        resolve()
      })
    })
    process.kill(pid, 'SIGKILL')
    await isBack
    assert.equal(nats.server.url, url)
    assert.notEqual(nats.server.pid, pid)
    const last = await nats.connection.readLast('KEPT', 'kept.a')
    assert.equal(new TextDecoder().decode(last?.data), '1')
  })

  it('keeps its secrets in one file that only its owner reads, and tells the server none', () => {
    const secretsPath = join(nats.folder.natsDir, 'secrets.json')
    const { seeds } = JSON.parse(readFileSync(secretsPath, 'utf8')) as { seeds: NatsSeeds }
    assert.equal(statSync(secretsPath).mode & 0o777, 0o600)
    const config = join(nats.folder.natsDir, 'nats-server.conf')
    assert.equal(statSync(config).mode & 0o777, 0o600)
    for (const path of [
      config,
      `/proc/${nats.server.pid}/cmdline`,
      `/proc/${nats.server.pid}/environ`,
    ]) {
      const text = readFileSync(path, 'utf8')
      for (const seed of Object.values(seeds)) assert.ok(!text.includes(seed), path)
    }
  })

  it('lets a worker exchange frames and read commits, and nothing else', async () => {
    const worker = await openUser(await nats.server.workerAddress('w-a', inAnHour()))
    const frames = worker.client.subscribe('tm.g.job-a.1.s.*.*.*')
    worker.client.publish('tm.g.job-a.1.s.0.1.w-a', 'x')
    for await (const frame of frames) {
      assert.equal(frame.subject, 'tm.g.job-a.1.s.0.1.w-a')
      break
    }
    for (const subject of [
      'tm.commit.job-a',
      'tm.event.job-a',
      'tm.job.job-a',
      '$JS.API.STREAM.DELETE.TM_COMMITS',
      '$JS.API.DIRECT.GET.TM_JOBS',
      '$SYS.REQ.SERVER.PING.VARZ',
      '_INBOX_coordinator.x',
    ]) {
      assert.deepEqual(await worker.publish(subject), [`publish ${subject}`])
    }
    for (const subject of ['tm.event.>', 'tm.commit.*', '$SYS.>', '$JS.>', '_INBOX.>', '>']) {
      assert.deepEqual(await worker.subscribe(subject), [`subscription ${subject}`])
    }
    await worker.client.close()
  })

  it('holds a worker to its own id: what it says, and what it hears', async () => {
    const worker = await openUser(await nats.server.workerAddress('w-a', inAnHour()))
    for (const subject of [
      'tm.g.job-a.1.c.w-b.0.1.w-a',
      'tm.g.job-a.1.k.w-b.w-a',
      'tm.g.job-a.1.s.0.1.w-a',
      '$JS.API.DIRECT.GET.TM_COMMITS',
    ]) {
      assert.deepEqual(await worker.publish(subject), [])
    }
    for (const subject of [
      'tm.g.job-a.1.c.w-b.0.1.w-b',
      'tm.g.job-a.1.k.w-b.w-c',
      'tm.g.job-a.1.s.0.1.w-b',
      'tm.g.job-a.1.s.0.1',
    ]) {
      assert.deepEqual(await worker.publish(subject), [`publish ${subject}`])
    }
    for (const subject of ['tm.g.job-a.1.c.w-a.0.1.*', 'tm.g.job-a.1.k.w-a.*', '_INBOX_w-a.x']) {
      assert.deepEqual(await worker.subscribe(subject), [])
    }
    for (const subject of [
      'tm.g.job-a.1.c.w-b.0.1.*',
      'tm.g.job-a.1.c.*.0.1.*',
      'tm.g.job-a.1.k.w-b.*',
      'tm.g.job-a.1.k.*.*',
      'tm.g.>',
      '_INBOX_w-b.>',
      '_INBOX_coordinator.>',
    ]) {
      assert.deepEqual(await worker.subscribe(subject), [`subscription ${subject}`])
    }
    await worker.client.close()
  })

  it('refuses credentials that have expired or are of another mesh, and says so', async () => {
    const expired = await nats.server.workerAddress('w-a', Date.now() - 60_000)
    await assert.rejects(WorkerConnection.open(expired), {
      code: 'NATS_UNREACHABLE',
      message: /refuses the credentials of w-a: they have expired or are of another mesh/,
    })
    const credentials = await workerUser(newSeeds(), 'w-a', {
      expiresMs: inAnHour(),
      userSeed: null,
    })
    await assert.rejects(WorkerConnection.open({ ...expired, credentials }), {
      code: 'NATS_UNREACHABLE',
      message: /refuses the credentials of w-a/,
    })
  })

  it('ends a connection whose credentials expire; renewed ones bring it back', async () => {
    const first = await nats.server.workerAddress('w-a', Date.now() + 1_000)
    const worker = await WorkerConnection.open(first)
    const seen: boolean[] = []
    const isBack = new Promise<void>((resolve) => {
      worker.onStatus((isUp) => {
        seen.push(isUp)
        if (isUp) resolve()
      })
    })
    worker.renew(await nats.server.workerAddress('w-a', inAnHour()))
    await isBack
    assert.deepEqual(seen, [false, true])
    await worker.close()
  })

  it('takes credentials of before its restart', async () => {
    const own = await openNats()
    const address = await own.server.workerAddress('w-a', inAnHour())
    await own.restart()
    assert.equal(own.server.url, address.url)
    const worker = await WorkerConnection.open(address)
    await worker.close()
    await own.close()
  })

  for (const [what, secrets] of [
    ['an earlier version left', { port: 1, coordinator: 'a', worker: 'b', system: 'c' }],
    ['has lost its keys', null],
  ] as const) {
    it(`finds what was stored in a folder that ${what}`, async () => {
      const own = await openNats()
      await own.connection.ensureStream({ name: 'KEPT', subjects: ['kept.*'] })
      await own.connection.append('kept.a', new TextEncoder().encode('1'), 0)
      await own.connection.close()
      await own.server.stop()
      const stores = join(own.folder.jetstreamDir, 'jetstream')
      const secretsPath = join(own.folder.natsDir, 'secrets.json')
      const { seeds } = JSON.parse(readFileSync(secretsPath, 'utf8')) as { seeds: NatsSeeds }
      if (secrets === null) rmSync(secretsPath)
      else {
        writeFileSync(secretsPath, JSON.stringify(secrets))
        renameSync(join(stores, accountName(seeds.mesh)), join(stores, 'MESH'))
      }
      await own.restart()
      const last = await own.connection.readLast('KEPT', 'kept.a')
      assert.equal(new TextDecoder().decode(last?.data), '1')
      await own.close()
    })
  }

  it('refuses a connection without credentials', async () => {
    await assert.rejects(connect({ servers: nats.server.url, reconnect: false }), /Authorization/)
  })

  it('ends when it is stopped, its watcher too', async () => {
    const own = await openNats()
    const pid = pidOf(own)
    await own.close()
    assert.throws(() => process.kill(pid, 0), /ESRCH/)
  })
})

describe('the search for nats-server', () => {
  const folder = temporaryFolder()
  after(() => rmSync(folder, { recursive: true }))
  const program = (name: string, version: string) => {
    const path = join(folder, name)
    writeFileSync(path, `#!/bin/sh\necho "nats-server: v${version}"\n`)
    chmodSync(path, 0o755)
    return path
  }

  it('refuses one that is too old and names its version and the set-up', async () => {
    const search = { explicit: program('old', '2.9.10'), path: '', cacheDir: folder }
    await assert.rejects(findNatsServer(search), {
      code: 'NATS_SERVER_TOO_OLD',
      message: /2\.9\.10.*npm run setup/,
    })
  })

  it('does not fall back to another where the one named is missing', async () => {
    const search = { explicit: join(folder, 'none'), path: '', cacheDir: folder }
    await assert.rejects(findNatsServer(search), {
      code: 'NATS_SERVER_MISSING',
      message: /TUNEMESH_NATS_SERVER names .*none/,
    })
  })

  it('takes the floor itself and what is above it', () => {
    assert.deepEqual(['2.11.9', '2.12.0', '2.15.2', '3.0.0', '1.99.0'].map(isNewEnough), [
      false,
      true,
      true,
      true,
      false,
    ])
  })
})
