/**
 * Content-addressed files to and from the coordinator, with resume by offset and a digest check.
 */
import { createHash, type Hash } from 'node:crypto'
import { constants, createReadStream, existsSync } from 'node:fs'
import { type FileHandle, mkdir, open, rename, rm, stat } from 'node:fs/promises'
import { dirname } from 'node:path'
import { Readable, type Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { diskError } from '../proto/disk-error.js'
import { TunemeshError } from '../proto/errors.js'
import type { BlobServiceClient } from '../proto/gen/tunemesh/v1/BlobService.js'
import type { PutRequest } from '../proto/gen/tunemesh/v1/PutRequest.js'
import type { StatResponse__Output } from '../proto/gen/tunemesh/v1/StatResponse.js'
import { errorOfRpc } from '../proto/rpc-error.js'
import { blobPieceBytes } from '../proto/services.js'
import { abortReason, withPatience, withRetries } from './retry.js'
import { callOnce, metadataWith, readStream, type StartUnary } from './rpc.js'

/** One attempt may take this long; what it moved is kept, and the next one goes on from there. */
const transferDeadlineMs = 30 * 60_000
const statDeadlineMs = 10_000

/** How long a transfer waits for a coordinator that is away, since the last byte that came. */
const defaultPatienceMs = 60_000

export type OnProgress = (doneBytes: number, totalBytes: number) => void

export interface TransferOptions {
  onProgress?: OnProgress | undefined
  signal?: AbortSignal | undefined
  patienceMs?: number
}

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
   * The bytes are hashed as they come. While the coordinator is away it waits, `patienceMs` long.
   * Two calls for one path do each other no harm: both write the same bytes at the same places.
   * @throws TunemeshError DIGEST_MISMATCH when the bytes are not those that the digest names;
   *   DISK_FULL
   */
  async fetch(digest: string, path: string, options: TransferOptions = {}): Promise<void> {
    const { signal, patienceMs = defaultPatienceMs } = options
    await mkdir(dirname(path), { recursive: true })
    const partPath = `${path}.part`
    const part = await PartFile.open(partPath)
    try {
      await withPatience((gotOn) => this.#fetchRest(part, { digest, gotOn, ...options }), {
        patienceMs,
        signal,
      })
      await part.sync()
    } catch (error) {
      // A part that is not the beginning of this blob is none to go on with.
      if ((error as { code?: unknown }).code === 'BLOB_CORRUPT') await rm(partPath, { force: true })
      throw error
    } finally {
      await part.close()
    }
    const got = part.digest()
    if (got !== digest) {
      await rm(partPath, { force: true })
      throw new TunemeshError(
        'DIGEST_MISMATCH',
        `${path} arrived as ${got}, expected ${digest}. The broken copy is deleted; fetch again.`,
      )
    }
    await rename(partPath, path).catch((error: NodeJS.ErrnoException) => {
      // Another call for this path has done it.
      if (error.code !== 'ENOENT' || !existsSync(path)) throw error
    })
  }

  async #fetchRest(
    part: PartFile,
    fetch: TransferOptions & { digest: string; gotOn: () => void },
  ): Promise<void> {
    const { digest, gotOn, onProgress, signal } = fetch
    const from = { digest, offset: part.numBytes }
    const context = { token: this.token, deadlineMs: transferDeadlineMs, signal }
    for await (const piece of readStream((m, o) => this.service.get(from, m, o), context)) {
      if (piece.offset !== part.numBytes) {
        throw new TunemeshError(
          'BLOB_CORRUPT',
          `${digest} arrived at offset ${piece.offset}, expected ${part.numBytes}. Fetch again.`,
        )
      }
      await part.add(piece.data, piece.totalBytes)
      gotOn()
      onProgress?.(part.numBytes, piece.totalBytes)
    }
  }

  /** Stores a file and answers with its digest; sends only what the coordinator has not got. */
  async put(path: string, options: TransferOptions = {}): Promise<string> {
    const { onProgress, signal, patienceMs = defaultPatienceMs } = options
    const digest = await digestOf(path)
    const { size } = await stat(path)
    let received = 0
    const send = async (gotOn: () => void) => {
      const known = await this.stat(digest)
      if (known.complete) return
      const offset = Math.min(known.receivedBytes, size)
      if (offset > received) gotOn()
      received = offset
      await this.#send({ path, digest, size, offset }, { onProgress, signal })
    }
    await withPatience(send, { patienceMs, signal })
    return digest
  }

  stat(digest: string): Promise<StatResponse__Output> {
    const start: StartUnary<StatResponse__Output> = (m, o, done) =>
      this.service.stat({ digest }, m, o, done)
    return withRetries(() => callOnce(start, { token: this.token, deadlineMs: statDeadlineMs }))
  }

  #send(upload: Upload, { onProgress, signal }: TransferOptions): Promise<void> {
    return new Promise((resolve, reject) => {
      const options = { deadline: Date.now() + transferDeadlineMs }
      const stream = this.service.put(metadataWith(this.token), options, (error) => {
        signal?.removeEventListener('abort', cancel)
        if (error) reject(signal?.aborted ? abortReason(signal) : errorOfRpc(error))
        else resolve()
      })
      const cancel = () => stream.cancel()
      signal?.addEventListener('abort', cancel, { once: true })
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

/** A file that grows, and the hash of what it has so far. */
class PartFile {
  private constructor(
    private readonly path: string,
    private readonly file: FileHandle,
    private readonly hash: Hash,
    public numBytes: number,
  ) {}

  static async open(path: string): Promise<PartFile> {
    const file = await open(path, constants.O_RDWR | constants.O_CREAT, 0o600)
    const hash = createHash('sha256')
    return new PartFile(path, file, hash, await hashAll(file, hash))
  }

  async add(data: Buffer, totalBytes: number): Promise<void> {
    try {
      for (let done = 0; done < data.length; ) {
        const at = this.numBytes + done
        done += (await this.file.write(data, done, data.length - done, at)).bytesWritten
      }
    } catch (error) {
      throw diskError(error, `${this.path} (${this.numBytes} of ${totalBytes} bytes are there)`)
    }
    this.hash.update(data)
    this.numBytes += data.length
  }

  sync(): Promise<void> {
    return this.file.datasync()
  }

  digest(): string {
    return `sha256:${this.hash.digest('hex')}`
  }

  close(): Promise<void> {
    return this.file.close()
  }
}

/** "sha256:<hex>" of a file. */
export async function digestOf(path: string, options: HashOptions = {}): Promise<string> {
  const hash = createHash('sha256')
  const file = await open(path)
  try {
    await hashAll(file, hash, options)
  } finally {
    await file.close()
  }
  return `sha256:${hash.digest('hex')}`
}

interface HashOptions {
  signal?: AbortSignal
  /** Bytes hashed since the last call. */
  onBytes?: (numBytes: number) => void
}

/** Answers how many bytes there are. */
async function hashAll(
  file: FileHandle,
  hash: Hash,
  { signal, onBytes }: HashOptions = {},
): Promise<number> {
  const piece = Buffer.allocUnsafe(blobPieceBytes)
  for (let at = 0; ; ) {
    signal?.throwIfAborted()
    const { bytesRead } = await file.read(piece, 0, piece.length, at)
    if (bytesRead === 0) return at
    hash.update(piece.subarray(0, bytesRead))
    at += bytesRead
    onBytes?.(bytesRead)
  }
}
