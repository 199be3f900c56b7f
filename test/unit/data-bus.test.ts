import assert from 'node:assert/strict'
import test from 'node:test'
import type { NatsAddress } from '../../proto/nats-client.js'
import { DataBus } from '../../worker/data-bus.js'

/** Connections that a test lets open when it likes. */
class Connections {
  readonly opened: {
    address: NatsAddress
    isClosed: boolean
    renew(address: NatsAddress): void
    close(): Promise<void>
  }[] = []
  wait: Promise<void> = Promise.resolve()
  readonly bus = new DataBus(async (address) => {
    const connection = {
      address,
      isClosed: false,
      renew: (renewed: NatsAddress) => {
        connection.address = renewed
      },
      close: async () => {
        connection.isClosed = true
      },
    }
    this.opened.push(connection)
    await this.wait
    return connection
  })
}

const first = { url: 'nats://127.0.0.1:1', user: 'w-a', credentials: { jwt: 'a', seed: 'a' } }
const second = { ...first, user: 'w-b' }
const later = { jwt: 'later', seed: 'later' }

test('two who ask at once share one connection, also after the same Welcome again', async () => {
  const { bus, opened } = new Connections()
  bus.moveTo(first)
  const [one, two] = await Promise.all([bus.connection(), bus.connection()])
  bus.moveTo({ ...first })
  assert.equal(one, two)
  assert.equal(await bus.connection(), one)
  assert.equal(opened.length, 1)
  await bus.close()
  assert.ok(one.isClosed)
})

test('a Welcome under another id closes the old connection and opens a new one', async () => {
  const { bus, opened } = new Connections()
  bus.moveTo(first)
  const old = await bus.connection()
  bus.moveTo(second)
  assert.ok(old.isClosed)
  assert.equal((await bus.connection()).address.user, 'w-b')
  assert.equal(opened.length, 2)
})

test('a connection still being opened when another Welcome comes is closed, not used', async () => {
  const connections = new Connections()
  const { bus, opened } = connections
  let letOpen = () => {}
  connections.wait = new Promise((resolve) => {
    letOpen = resolve
  })
  bus.moveTo(first)
  const refused = assert.rejects(bus.connection(), { code: 'NATS_UNREACHABLE' })
  bus.moveTo(second)
  const fresh = bus.connection()
  letOpen()
  await refused
  assert.equal((await fresh).address.user, 'w-b')
  assert.deepEqual(
    opened.map(({ isClosed }) => isClosed),
    [true, false],
  )
})

test('renewed credentials reach the open connection, which stays', async () => {
  const { bus, opened } = new Connections()
  bus.moveTo(first)
  const open = await bus.connection()
  bus.renew(later)
  assert.deepEqual(open.address.credentials, later)
  assert.equal(await bus.connection(), open)
  assert.ok(!open.isClosed)
  assert.equal(opened.length, 1)
})

test('credentials renewed while a connection is being opened reach it too', async () => {
  const connections = new Connections()
  const { bus } = connections
  let letOpen = () => {}
  connections.wait = new Promise((resolve) => {
    letOpen = resolve
  })
  bus.moveTo(first)
  const opening = bus.connection()
  bus.renew(later)
  letOpen()
  assert.deepEqual((await opening).address.credentials, later)
})

test('a failed opening is forgotten', async () => {
  const connections = new Connections()
  connections.bus.moveTo(first)
  connections.wait = Promise.reject(new Error('away'))
  await assert.rejects(connections.bus.connection(), /away/)
  connections.wait = Promise.resolve()
  await connections.bus.connection()
  assert.equal(connections.opened.length, 2)
})
