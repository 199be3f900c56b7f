/** A nats-server of its own for a test, on a temporary state folder. */
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join } from 'node:path'
import pino from 'pino'
import { findNatsServer } from '../../coordinator/nats-binary.js'
import { NatsConnection } from '../../coordinator/nats-connection.js'
import { NatsServer } from '../../coordinator/nats-server.js'
import { StateFolder } from '../../coordinator/state-folder.js'

export const silentLog = pino({ level: 'silent' })

export interface NatsFixture {
  folder: StateFolder
  server: NatsServer
  connection: NatsConnection
  /** Ends the server and opens it again on the same folder. */
  restart(): Promise<void>
  close(): Promise<void>
}

export async function natsBinary(): Promise<string> {
  const cache = process.env.XDG_CACHE_HOME || join(homedir(), '.cache')
  const { path } = await findNatsServer({
    explicit: process.env.TUNEMESH_NATS_SERVER ?? '',
    path: process.env.PATH ?? '',
    cacheDir: join(cache, 'tunemesh', 'nats-server'),
  })
  return path
}

/** Of nats-server itself; never 0, which would be our own process group. */
export function pidOf({ server }: NatsFixture): number {
  assert.ok(server.pid !== null && server.pid > 1)
  return server.pid
}

export const temporaryFolder = () => mkdtempSync(join(tmpdir(), 'tunemesh-test-'))

export async function openNats(): Promise<NatsFixture> {
  const path = temporaryFolder()
  const binary = await natsBinary()
  const folder = StateFolder.open(path)
  const start = () => NatsServer.start({ binary, folder, log: silentLog })
  const fixture: NatsFixture = {
    folder,
    server: await start(),
    connection: undefined as never,
    async restart() {
      await fixture.connection.close()
      await fixture.server.stop()
      fixture.server = await start()
      fixture.connection = await NatsConnection.open(fixture.server.coordinatorAddress, 10_000)
    },
    async close() {
      await fixture.connection.close()
      await fixture.server.stop()
      folder.close()
      rmSync(path, { recursive: true, force: true })
    },
  }
  fixture.connection = await NatsConnection.open(fixture.server.coordinatorAddress, 10_000)
  return fixture
}
