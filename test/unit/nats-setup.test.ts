import assert from 'node:assert/strict'
import { once } from 'node:events'
import { createServer, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { join } from 'node:path'
import test from 'node:test'
import { pathToFileURL } from 'node:url'
import { projectTop } from '../project-top.js'

const mebibyte = Buffer.alloc(1 << 20)

/** For as long as the other side reads. */
function sendForEver(response: ServerResponse): void {
  while (!response.destroyed) {
    if (!response.write(mebibyte)) return void response.once('drain', () => sendForEver(response))
  }
}

test('a download ends at 64 MiB, whatever the other side sends', { timeout: 60_000 }, async () => {
  const script = pathToFileURL(join(projectTop, 'scripts', 'nats-setup.mjs')).href
  const { download } = (await import(script)) as { download(url: string): Promise<Buffer> }
  const server = createServer(({ url }, response) =>
    url === '/small' ? response.end('whole') : sendForEver(response),
  ).listen(0, '127.0.0.1')
  await once(server, 'listening')
  const base = `http://127.0.0.1:${(server.address() as AddressInfo).port}`
  assert.equal((await download(`${base}/small`)).toString(), 'whole')
  await assert.rejects(download(`${base}/endless`), /endless has more than 64 MiB/)
  server.closeAllConnections()
  server.close()
})
