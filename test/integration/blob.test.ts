import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import * as grpc from '@grpc/grpc-js'
import { blobHandlers } from '../../coordinator/blob-service.js'
import { BlobStore } from '../../coordinator/blob-store.js'
import { RpcHandlers } from '../../coordinator/rpc-handlers.js'
import { errorOfRpc } from '../../proto/rpc-error.js'
import { BlobService, channelOptions, serverOptions } from '../../proto/services.js'
import { silentLog, temporaryFolder } from './open-nats.js'

const digestOf = (bytes: Uint8Array) => `sha256:${createHash('sha256').update(bytes).digest('hex')}`
const piecesOf = async function* (bytes: Uint8Array, size = 1 << 20) {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size)
}

describe('blob store', () => {
  const folder = temporaryFolder()
  let store: BlobStore
  before(async () => {
    store = await BlobStore.open(folder)
  })
  after(() => rmSync(folder, { recursive: true }))
  const bytes = randomBytes(2_500_001)
  const digest = digestOf(bytes)
  const upload = { digest, sizeBytes: bytes.length, offset: 0 }

  it('goes on with a broken upload from where it stood', async () => {
    const broken = async function* () {
      yield bytes.subarray(0, 1_000_000)
      throw new Error('the wire broke')
    }
    await assert.rejects(store.put(upload, broken()), /wire broke/)
    assert.deepEqual(store.status(digest), { complete: false, receivedBytes: 1_000_000 })
    const rest = { ...upload, offset: 1_000_000 }
    await store.put(rest, piecesOf(bytes.subarray(1_000_000)))
    assert.deepEqual(readFileSync(store.pathOf(digest)), bytes)
  })

  it('refuses an upload whose bytes are not those of the digest, and forgets it', async () => {
    const other = randomBytes(1_000)
    const lie = { digest: digestOf(randomBytes(5)), sizeBytes: 1_000, offset: 0 }
    await assert.rejects(store.put(lie, piecesOf(other)), { code: 'DIGEST_MISMATCH' })
    assert.deepEqual(store.status(lie.digest), { complete: false, receivedBytes: 0 })
  })

  it('refuses an upload that is longer than announced', async () => {
    const long = { digest: digestOf(randomBytes(6)), sizeBytes: 10, offset: 0 }
    await assert.rejects(store.put(long, piecesOf(randomBytes(11))), { code: 'BLOB_CORRUPT' })
  })

  it('takes two uploads of the same blob at once', async () => {
    const same = randomBytes(300_000)
    const twice = { digest: digestOf(same), sizeBytes: same.length, offset: 0 }
    await Promise.all([
      store.put(twice, piecesOf(same, 1_000)),
      store.put(twice, piecesOf(same, 777)),
    ])
    assert.deepEqual(readFileSync(store.pathOf(twice.digest)), same)
  })

  it('serves a file of this machine in place, and notices when it was changed', async () => {
    const path = join(folder, 'model.bin')
    writeFileSync(path, 'weights')
    const reference = digestOf(Buffer.from('weights'))
    await store.reference(path, reference)
    assert.equal(store.pathOf(reference), path)
    writeFileSync(path, 'other weights')
    assert.throws(() => store.status(reference), { code: 'BLOB_CORRUPT' })
  })

  it('takes no digest that is not one for a file name', () => {
    for (const name of ['sha256:../../x', 'sha256:', `md5:${'0'.repeat(32)}`, '../../etc/passwd']) {
      assert.throws(() => store.status(name), { code: 'BLOB_NOT_FOUND' })
    }
  })
})

describe('blob service', () => {
  const folder = temporaryFolder()
  const server = new grpc.Server(serverOptions)
  let client: InstanceType<typeof BlobService>
  before(async () => {
    const store = await BlobStore.open(folder)
    server.addService(BlobService.service, blobHandlers(store, new RpcHandlers(silentLog)))
    const port = await new Promise<number>((resolve, reject) => {
      const credentials = grpc.ServerCredentials.createInsecure()
      server.bindAsync('127.0.0.1:0', credentials, (error, bound) =>
        error === null ? resolve(bound) : reject(error),
      )
    })
    const credentials = grpc.credentials.createInsecure()
    client = new BlobService(`127.0.0.1:${port}`, credentials, channelOptions)
  })
  after(() => {
    client.close()
    server.forceShutdown()
    rmSync(folder, { recursive: true })
  })

  const put = (messages: object[]) =>
    new Promise((resolve, reject) => {
      const call = client.put((error, response) =>
        error === null ? resolve(response) : reject(errorOfRpc(error)),
      )
      for (const message of messages) call.write(message)
      call.end()
    })
  const get = async (digest: string, offset: number) => {
    const parts: Buffer[] = []
    for await (const { data } of client.get({ digest, offset })) parts.push(data)
    return Buffer.concat(parts)
  }

  it('gives back what was put, whole and from an offset', async () => {
    const bytes = randomBytes(3_000_000)
    const digest = digestOf(bytes)
    const messages: object[] = [{ begin: { digest, sizeBytes: bytes.length, offset: 0 } }]
    for await (const data of piecesOf(bytes)) messages.push({ data })
    assert.deepEqual(await put(messages), { digest, sizeBytes: bytes.length })
    assert.deepEqual(await get(digest, 0), bytes)
    assert.deepEqual(await get(digest, 2_999_990), bytes.subarray(2_999_990))
  })

  it('refuses a first message that is not begin, with our code', async () => {
    await assert.rejects(put([{ data: Buffer.from('x') }]), { code: 'BLOB_CORRUPT' })
  })

  it('says which blob is not there', async () => {
    const digest = digestOf(Buffer.from('never stored'))
    await assert.rejects(
      get(digest, 0).catch((error) => {
        throw errorOfRpc(error)
      }),
      { code: 'BLOB_NOT_FOUND', message: new RegExp(digest) },
    )
  })
})
