import assert from 'node:assert/strict'
import { chmodSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { connect } from 'nats'
import { findNatsServer } from '../../coordinator/nats-binary.js'
import { isNewEnough } from '../../proto/nats-search.js'
import { type NatsFixture, openNats, pidOf, temporaryFolder } from './open-nats.js'

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

  it('keeps its secrets in files that only their owner can read, and out of argv', () => {
    const config = join(nats.folder.natsDir, 'nats-server.conf')
    const { password } = nats.server.workerAddress
    assert.equal(statSync(config).mode & 0o777, 0o600)
    assert.ok(readFileSync(config, 'utf8').includes(password))
    assert.ok(!readFileSync(`/proc/${nats.server.pid}/cmdline`, 'utf8').includes(password))
    assert.ok(!readFileSync(`/proc/${nats.server.pid}/environ`, 'utf8').includes(password))
  })

  it('lets a worker exchange frames and read commits, and nothing else', async () => {
    const { url, user, password } = nats.server.workerAddress
    const worker = await connect({ servers: url, user, pass: password })
    const refused: string[] = []
    void (async () => {
      for await (const status of worker.status()) {
        if (status.type === 'error' && status.permissionContext) {
          refused.push(`${status.permissionContext.operation} ${status.permissionContext.subject}`)
        }
      }
    })()
    const frames = worker.subscribe('tm.g.job-a.1.s.*.*')
    worker.publish('tm.g.job-a.1.s.0.1', 'x')
    for await (const frame of frames) {
      assert.equal(frame.subject, 'tm.g.job-a.1.s.0.1')
      break
    }
    worker.publish('tm.commit.job-a', 'forged')
    worker.publish('$JS.API.STREAM.DELETE.TM_COMMITS', '')
    const events = worker.subscribe('tm.event.>', { callback: () => {} })
    await worker.flush()
    await worker.flush()
    events.unsubscribe()
    await worker.close()
    assert.deepEqual(refused.sort(), [
      'publish $JS.API.STREAM.DELETE.TM_COMMITS',
      'publish tm.commit.job-a',
      'subscription tm.event.>',
    ])
  })

  it('refuses a connection without a password', async () => {
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
