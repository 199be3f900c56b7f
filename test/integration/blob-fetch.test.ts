import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, beforeEach, describe, test } from 'node:test'
import * as grpc from '@grpc/grpc-js'
import { Blobs } from '../../client/blobs.js'
import type { BlobServiceHandlers } from '../../proto/gen/tunemesh/v1/BlobService.js'
import { BlobService, channelOptions, serverOptions } from '../../proto/services.js'
import { temporaryFolder } from './open-nats.js'

const pieceBytes = 1 << 18
const bytes = randomBytes(8 * pieceBytes + 77)
const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`

describe('fetching a blob', () => {
  const folder = temporaryFolder()
  const disk = join(folder, 'disk')
  const server = new grpc.Server(serverOptions)
  let service: InstanceType<typeof BlobService>
  let blobs: Blobs
  /** Offsets asked for. */
  let asked: number[]
  /** Pieces of one answer before it breaks. */
  let numPieces: number
  let content: Buffer

  const Get: BlobServiceHandlers['Get'] = (call) => {
    let { offset } = call.request
    asked.push(offset)
    for (let sent = 0; sent < numPieces && offset < content.length; sent++) {
      const data = content.subarray(offset, offset + pieceBytes)
      call.write({ data, offset, totalBytes: content.length })
      offset += data.length
    }
    if (offset >= content.length) return call.end()
    const broken = { code: grpc.status.UNAVAILABLE, details: 'the line is down' }
    call.emit('error', Object.assign(new Error('the line is down'), broken))
  }

  before(async () => {
    server.addService(BlobService.service, { Get, Put: () => {}, Stat: () => {} })
    const port = await new Promise<number>((resolve, reject) => {
      const credentials = grpc.ServerCredentials.createInsecure()
      server.bindAsync('127.0.0.1:0', credentials, (error, bound) =>
        error === null ? resolve(bound) : reject(error),
      )
    })
    const credentials = grpc.credentials.createInsecure()
    service = new BlobService(`127.0.0.1:${port}`, credentials, channelOptions)
    blobs = new Blobs(service, 'token')
  })
  beforeEach(() => {
    asked = []
    numPieces = Number.POSITIVE_INFINITY
    content = bytes
  })
  after(() => {
    service.close()
    server.forceShutdown()
    spawnSync('umount', ['-l', disk])
    rmSync(folder, { recursive: true, force: true })
  })

  test('a line that breaks over and over: it goes on from where it was', async () => {
    numPieces = 3
    const path = join(folder, 'broken')
    const told: number[] = []
    await blobs.fetch(digest, path, { onProgress: (done) => told.push(done) })
    assert.deepEqual(readFileSync(path), bytes)
    assert.deepEqual(asked, [0, 3 * pieceBytes, 6 * pieceBytes])
    assert.equal(told.at(-1), bytes.length)
    assert.deepEqual(
      told,
      [...told].sort((a, b) => a - b),
    )
  })

  test('what an earlier process left is gone on with, and checked as well', async () => {
    const path = join(folder, 'resumed')
    writeFileSync(`${path}.part`, bytes.subarray(0, 1_000))
    await blobs.fetch(digest, path)
    assert.deepEqual(asked, [1_000])
    assert.deepEqual(readFileSync(path), bytes)

    const other = join(folder, 'wrong')
    writeFileSync(`${other}.part`, randomBytes(1_000))
    await assert.rejects(blobs.fetch(digest, other), { code: 'DIGEST_MISMATCH' })
    assert.deepEqual([existsSync(other), existsSync(`${other}.part`)], [false, false])
  })

  test('two at once for one path do each other no harm', async () => {
    const path = join(folder, 'twice')
    await Promise.all([blobs.fetch(digest, path), blobs.fetch(digest, path)])
    assert.deepEqual(readFileSync(path), bytes)
  })

  test('no coordinator for longer than its patience: named; the part stays', async () => {
    numPieces = 2
    const path = join(folder, 'away')
    const gone = blobs.fetch(digest, path, {
      patienceMs: 1,
      onProgress: () => {
        numPieces = 0
      },
    })
    await assert.rejects(gone, { code: 'COORDINATOR_UNREACHABLE' })
    assert.equal(readFileSync(`${path}.part`).length, 2 * pieceBytes)
  })

  test('given up by its caller: it ends, and the part stays', async () => {
    numPieces = 2
    const path = join(folder, 'aborted')
    const abort = new AbortController()
    const fetching = blobs.fetch(digest, path, {
      signal: abort.signal,
      onProgress: () => {
        numPieces = 0
        abort.abort(new Error('not wanted'))
      },
    })
    await assert.rejects(fetching, /not wanted/)
    assert.ok(existsSync(`${path}.part`))
  })

  test('a disk that fills on the way is named, with what is there', async (t) => {
    mkdirSync(disk)
    const mount = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk])
    if (mount.status !== 0) return t.skip('a small disk can be mounted by root only')
    await assert.rejects(blobs.fetch(digest, join(disk, 'large')), {
      code: 'DISK_FULL',
      message: /large\.part \(\d+ of 2097229 bytes are there\) does not fit on the disk/,
    })
  })
})
