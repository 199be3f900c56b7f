import assert from 'node:assert/strict'
import test from 'node:test'
import { DataBus } from '../../worker/data-bus.js'
import type { NatsAddress } from '../../worker/nats-connection.js'

/** Connections that a test lets open when it likes. */
class Connections {
  readonly opened: { address: NatsAddress; isClosed: boolean; close(): Promise<void> }[] = []
  wait: Promise<void> = Promise.resolve()
  readonly bus = new DataBus(async (address) => {
    const connection = {
      address,
      isClosed: false,
      close: async () => {
        connection.isClosed = true
      },
    }
    this.opened.push(connection)
    await this.wait
    return connection
  })
}

const first = { url: 'nats://127.0.0.1:1', user: 'worker', password: 'a' }
const second = { ...first, password: 'b' }

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

test('a Welcome with another password closes the old connection and opens a new one', async () => {
  const { bus, opened } = new Connections()
  bus.moveTo(first)
  const old = await bus.connection()
  bus.moveTo(second)
  assert.ok(old.isClosed)
  assert.equal((await bus.connection()).address.password, 'b')
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
  assert.equal((await fresh).address.password, 'b')
  assert.deepEqual(
    opened.map(({ isClosed }) => isClosed),
    [true, false],
  )
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
