import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { CertificateAuthority } from '../../coordinator/certificate-authority.js'
import { NatsServer } from '../../coordinator/nats-server.js'
import { StateFolder } from '../../coordinator/state-folder.js'
import { connectNats, type NatsAddress } from '../../proto/nats-client.js'
import { coordinatorTlsName } from '../../proto/tls.js'
import { natsBinary, silentLog, temporaryFolder } from './open-nats.js'

test('nats by TLS: a reconnect shows the newest certificate', { timeout: 60_000 }, async () => {
  const path = temporaryFolder()
  const folder = StateFolder.open(path)
  const authority = CertificateAuthority.open(join(path, 'tls'), Date.now())
  const tls = {
    host: '127.0.0.2',
    port: 0,
    server: authority.server([coordinatorTlsName], Date.now()),
    local: authority.local(Date.now()),
  }
  const server = await NatsServer.start({
    binary: await natsBinary(),
    folder,
    log: silentLog,
    tls,
  })
  assert.match(server.url, /^nats:\/\/127\.0\.0\.2:/)
  const read: string[] = []
  const shown = (name: string): NatsAddress => {
    const { ca, certificate, key } = authority.local(Date.now())
    const identity = {
      ca,
      key,
      get certificate() {
        read.push(name)
        return certificate
      },
    }
    return { ...server.coordinatorAddress, tls: identity }
  }
  let address = shown('first')
  const client = await connectNats(() => address, { timeoutMs: 10_000, noEcho: false })
  assert.equal(read.at(-1), 'first')
  address = shown('second')
  const back = (async () => {
    for await (const { type } of client.status()) if (type === 'reconnect') return
  })()
  assert.ok(server.pid !== null && server.pid > 1)
  process.kill(server.pid, 'SIGKILL')
  await back
  assert.equal(read.at(-1), 'second')
  await client.flush()
  await client.close()
  await server.stop()
  folder.close()
  rmSync(path, { recursive: true, force: true })
})
