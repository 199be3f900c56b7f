/**
 * Content-addressed files to and from the coordinator, with resume by offset and a digest check.
 */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { mkdir, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { Readable, type Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { TunemeshError } from '../proto/errors.js'
import type { BlobServiceClient } from '../proto/gen/tunemesh/v1/BlobService.js'
import type { PutRequest } from '../proto/gen/tunemesh/v1/PutRequest.js'
import type { StatResponse__Output } from '../proto/gen/tunemesh/v1/StatResponse.js'
import { errorOfRpc } from '../proto/rpc-error.js'
import { blobPieceBytes } from '../proto/services.js'
import { withRetries } from './retry.js'
import { callOnce, metadataWith, readStream, type StartUnary } from './rpc.js'

/** One attempt may take this long; what it moved is kept, and the next one goes on from there. */
const transferDeadlineMs = 30 * 60_000
const statDeadlineMs = 10_000

export type OnProgress = (doneBytes: number, totalBytes: number) => void

interface Upload {
  path: string
  digest: string
  size: number
  offset: number
}

export class Blobs {
  constructor(
    private readonly service: BlobServiceClient,
    private readonly token: string,
  ) {}

  /**
   * Writes the blob to `path`: first to `path`.part, which a later call goes on with, then renamed.
   * @throws TunemeshError DIGEST_MISMATCH when the bytes are not those that the digest names
   */
  async fetch(digest: string, path: string, onProgress?: OnProgress): Promise<void> {
    await mkdir(dirname(path), { recursive: true })
    const partPath = `${path}.part`
    await withRetries(() => this.#fetchRest(digest, partPath, onProgress))
    const got = await digestOf(partPath)
    if (got !== digest) {
      await rm(partPath, { force: true })
      throw new TunemeshError(
        'DIGEST_MISMATCH',
        `${path} arrived as ${got}, expected ${digest}. The broken copy is deleted; fetch again.`,
      )
    }
    await rename(partPath, path)
  }

  async #fetchRest(digest: string, partPath: string, onProgress?: OnProgress): Promise<void> {
    const file = await open(partPath, 'a')
    try {
      let at = (await file.stat()).size
      const from = { digest, offset: at }
      const pieces = readStream((m, o) => this.service.get(from, m, o), {
        token: this.token,
        deadlineMs: transferDeadlineMs,
      })
      for await (const piece of pieces) {
        if (piece.offset !== at) {
          throw new TunemeshError(
            'BLOB_CORRUPT',
            `${digest} arrived at offset ${piece.offset}, expected ${at}. Fetch again.`,
          )
        }
        await file.writeFile(piece.data)
        at += piece.data.length
        onProgress?.(at, piece.totalBytes)
      }
      await file.datasync()
    } finally {
      await file.close()
    }
  }

  /** Stores a file and answers with its digest; sends only what the coordinator has not got. */
  async put(path: string, onProgress?: OnProgress): Promise<string> {
    const digest = await digestOf(path)
    const { size } = await stat(path)
    await withRetries(async () => {
      const known = await this.stat(digest)
      if (known.complete) return
      const offset = Math.min(known.receivedBytes, size)
      await this.#send({ path, digest, size, offset }, onProgress)
    })
    return digest
  }

  stat(digest: string): Promise<StatResponse__Output> {
    const start: StartUnary<StatResponse__Output> = (m, o, done) =>
      this.service.stat({ digest }, m, o, done)
    return withRetries(() => callOnce(start, { token: this.token, deadlineMs: statDeadlineMs }))
  }

  #send(upload: Upload, onProgress?: OnProgress): Promise<void> {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + transferDeadlineMs }
      const stream = this.service.put(metadataWith(this.token), options, (error) => {
        if (error) reject(errorOfRpc(error))
        else resolve()
      })
      // A worker's memory is planned: no more pieces are read ahead than are sent.
      const pieces = Readable.from(piecesOf(upload, onProgress), { highWaterMark: 1 })
      pipeline(pieces, stream as unknown as Writable).catch((error: unknown) => {
        // A refused call breaks the pipe as well, and its own error is the true one: it comes
        // first.
        pieces.destroy()
        setImmediate(() => reject(error))
        stream.cancel()
      })
    })
  }
}

async function* piecesOf(upload: Upload, onProgress?: OnProgress): AsyncGenerator<PutRequest> {
  const { digest, size, offset } = upload
  yield { begin: { digest, sizeBytes: size, offset } }
  let sent = offset
  const file = createReadStream(upload.path, { start: offset, highWaterMark: blobPieceBytes })
  for await (const data of file) {
    yield { data: data as Buffer }
    sent += (data as Buffer).length
    onProgress?.(sent, size)
  }
}

async function digestOf(path: string): Promise<string> {
  const hash = createHash('sha256')
  const piece = Buffer.allocUnsafe(blobPieceBytes)
  const file = await open(path)
  try {
    for (;;) {
      const { bytesRead } = await file.read(piece, 0, piece.length)
      if (bytesRead === 0) break
      hash.update(piece.subarray(0, bytesRead))
    }
  } finally {
    await file.close()
  }
  return `sha256:${hash.digest('hex')}`
}
