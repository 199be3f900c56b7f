import assert from 'node:assert/strict'
import { on } from 'node:events'
import { mkdirSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { WebSocket } from 'ws'
import { BrowserAccess } from '../../coordinator/access.js'
import { EventLog } from '../../coordinator/event-log.js'
import { Fleet } from '../../coordinator/fleet.js'
import { HttpServer } from '../../coordinator/http-server.js'
import { type JobRecord, JobStore } from '../../coordinator/job-store.js'
import { jobId } from '../../proto/ids.js'
import type { FromCoordinator } from '../../proto/live-feed.js'
import { type NatsFixture, openNats, silentLog } from './open-nats.js'

interface Answer {
  status: number
  headers: Record<string, string | string[] | undefined>
  body: string
}

describe('the page server', () => {
  let nats: NatsFixture
  let http: HttpServer
  let events: EventLog
  let nowMs = 1_000_000
  let cookie = ''

  before(async () => {
    nats = await openNats()
    const pagesDir = join(nats.folder.path, 'pages')
    mkdirSync(join(pagesDir, 'assets'), { recursive: true })
    writeFileSync(join(pagesDir, 'index.html'), '<!doctype html>page')
    writeFileSync(join(pagesDir, 'assets', 'a.js'), 'script')
    events = await EventLog.open(nats.connection, {
      log: silentLog,
      nowMs: () => 5,
      onFenced: assert.ifError,
    })
    const store = await JobStore.open(nats.connection)
    await store.create({ jobId: jobId('job-a'), state: 'RUNNING', createdAtMs: 1 } as JobRecord)
    http = await HttpServer.listen({
      port: 0,
      pagesDir,
      access: new BrowserAccess('secret', () => nowMs),
      feed: {
        store,
        events,
        fleet: new Fleet({ deadAfterMs: 1_000, nowMs: () => 0, maxWorkers: 4 }),
        nowMs: () => Date.now(),
      },
      log: silentLog,
    })
  })
  after(async () => {
    await http.close()
    await events.close()
    await nats.close()
  })

  const ask = (path: string, headers: Record<string, string> = {}, method = 'GET') =>
    new Promise<Answer>((resolve, reject) => {
      const call = request({ port: http.port, host: '127.0.0.1', path, method, headers })
      call.on('error', reject)
      call.on('response', (response) => {
        let body = ''
        response.on('data', (piece) => {
          body += piece
        })
        response.on('end', () =>
          resolve({ status: response.statusCode ?? 0, headers: response.headers, body }),
        )
      })
      call.end()
    })
  const enter = async () => {
    const url = new URL(http.newTicketUrl())
    const answer = await ask(`${url.pathname}${url.search}`)
    const [set] = answer.headers['set-cookie'] as string[]
    return { answer, url, cookie: set?.split(';')[0] ?? '', attributes: set ?? '' }
  }

  it('gives a cookie for a ticket once, and the page for the cookie', async () => {
    const entered = await enter()
    cookie = entered.cookie
    assert.equal(entered.answer.status, 303)
    assert.equal(entered.answer.headers.location, '/')
    assert.match(entered.attributes, /HttpOnly; SameSite=Strict/)
    const again = await ask(`${entered.url.pathname}${entered.url.search}`)
    assert.equal(again.status, 401)
    const page = await ask('/', { cookie })
    assert.deepEqual([page.status, page.body], [200, '<!doctype html>page'])
    assert.match(String(page.headers['content-security-policy']), /default-src 'none'/)
    assert.equal(page.headers['x-content-type-options'], 'nosniff')
    assert.equal((await ask('/assets/a.js', { cookie })).body, 'script')
  })

  it('refuses a ticket that is too old', async () => {
    const url = new URL(http.newTicketUrl())
    nowMs += 10 * 60_000 + 1
    assert.equal((await ask(`/${url.search}`)).status, 401)
  })

  it('shows nothing without the cookie, or with a forged one', async () => {
    for (const headers of [{}, { cookie: `tunemesh-${http.port}=1.2.3` }]) {
      assert.equal((await ask('/', headers)).status, 401)
      assert.equal((await ask('/assets/a.js', headers)).status, 401)
    }
  })

  it('refuses foreign hosts and origins, and methods that change things', async () => {
    const own = `127.0.0.1:${http.port}`
    const hosts = ['evil.example', `evil.example:${http.port}`, '127.0.0.1', `${own}.`, '0.0.0.0']
    for (const host of hosts) assert.equal((await ask('/', { host, cookie })).status, 403, host)
    for (const origin of ['http://evil.example', 'null', `https://${own}`, `http://${own}0`]) {
      assert.equal((await ask('/', { origin, cookie })).status, 403, origin)
    }
    assert.equal((await ask('/', { origin: `http://${own}`, cookie })).status, 200)
    for (const method of ['POST', 'PUT', 'DELETE']) {
      assert.equal((await ask('/', { cookie }, method)).status, 405)
    }
  })

  it('serves no file outside its folder', async () => {
    const paths = ['/../token', '/%2e%2e/token', '/..%2ftoken', '/assets/../../token', '/%00', '/%']
    for (const path of paths) assert.equal((await ask(path, { cookie })).status, 404, path)
  })

  const openSocket = async (headers: Record<string, string>) => {
    const socket = new WebSocket(`ws://127.0.0.1:${http.port}/live`, { headers })
    const opened = await new Promise<boolean>((resolve) => {
      socket.on('open', () => resolve(true))
      socket.on('error', () => resolve(false))
    })
    return { socket, opened }
  }

  it('opens the live feed only to its own page', async () => {
    const origin = `http://127.0.0.1:${http.port}`
    assert.equal((await openSocket({ cookie })).opened, false)
    assert.equal((await openSocket({ origin })).opened, false)
    assert.equal((await openSocket({ cookie, origin: 'http://evil.example' })).opened, false)
    const { socket, opened } = await openSocket({ cookie, origin })
    assert.ok(opened)
    socket.close()
  })

  it('outlives an upgrade to what is no address', async () => {
    for (const path of ['//', '//[', '/live/../', 'http://%']) {
      assert.equal(await upgradeStatus(path), 401, path)
    }
    assert.equal((await ask('/', { cookie })).status, 200)
  })

  const upgradeStatus = (path: string): Promise<number> =>
    new Promise((resolve, reject) => {
      const headers = { connection: 'Upgrade', upgrade: 'websocket' }
      const asked = request({ host: '127.0.0.1', port: http.port, path, headers })
      asked.on('response', (response) => {
        response.destroy()
        resolve(response.statusCode ?? 0)
      })
      asked.on('error', reject)
      asked.end()
    })

  it('sends the events of the chosen job from a sequence on, then live ones', async () => {
    const line = (message: string) => ({ log: { level: 'info', message, workerId: '' } })
    for (let number = 1; number <= 700; number++) events.append('job-a', line(`${number}`))
    await events.flush()
    const origin = `http://127.0.0.1:${http.port}`
    const socket = new WebSocket(`ws://127.0.0.1:${http.port}/live`, {
      headers: { cookie, origin },
    })
    const seen: number[] = []
    const types = new Set<string>()
    socket.on('open', () => {
      socket.send(JSON.stringify({ type: 'subscribe', jobId: 'job-a', afterSequence: 10 }))
    })
    await new Promise<void>((resolve) => {
      socket.on('message', (data) => {
        const message = JSON.parse(String(data)) as FromCoordinator
        types.add(message.type)
        if (message.type !== 'events') return
        seen.push(...message.events.map((event) => event.sequence))
        if (seen.at(-1) === 700) events.append('job-a', line('live'))
        if (seen.at(-1) === 701) resolve()
      })
    })
    socket.close()
    assert.deepEqual(
      seen,
      Array.from({ length: 691 }, (_, index) => index + 11),
    )
    assert.ok(types.has('hello') && types.has('events'))
  })

  it('ignores what is no subscription', async () => {
    const origin = `http://127.0.0.1:${http.port}`
    const { socket } = await openSocket({ cookie, origin })
    socket.send('not json')
    socket.send(JSON.stringify({ type: 'subscribe', jobId: 'job-none', afterSequence: 0 }))
    socket.send(JSON.stringify({ type: 'subscribe', jobId: 'job-a', afterSequence: 700 }))
    for await (const [data] of on(socket, 'message')) {
      const message = JSON.parse(String(data)) as FromCoordinator
      if (message.type === 'events') {
        assert.equal(message.events[0]?.sequence, 701)
        break
      }
    }
    socket.close()
  })
})
