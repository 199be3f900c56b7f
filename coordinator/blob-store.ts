/**
 * Content-addressed files in one folder: written to a temporary file, synced, renamed, or not
 * there. An unfinished upload stays in `partial/` and goes on from where it broke. A file that lies
 * on this machine anyway is referenced by path instead of copied.
 */
import { createHash, type Hash, randomBytes } from 'node:crypto'
import {
  createReadStream,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
} from 'node:fs'
import { type FileHandle, open, readdir, rename, rm, stat, truncate } from 'node:fs/promises'
import { join } from 'node:path'
import { diskError } from '../proto/disk-error.js'
import { TunemeshError } from '../proto/errors.js'
import { writePrivate } from './state-folder.js'

/**
 * "sha256:<64 hex digits>": the only form of a digest, and the only text that becomes a file name.
 */
const digestForm = /^sha256:([0-9a-f]{64})$/

/** Unfinished uploads older than this are removed when the store is opened. */
const partialLifeMs = 7 * 24 * 3_600_000

/** How often the time of the last use is written at most. */
const usedEveryMs = 3_600_000

export interface StoredBlob {
  digest: string
  sizeBytes: number
}

interface Reference {
  path: string
  sizeBytes: number
  modifiedMs: number
}

export type BlobStatus =
  | { complete: true; sizeBytes: number; path: string }
  | { complete: false; receivedBytes: number }

export class BlobStore {
  readonly #wholeDir: string
  readonly #partialDir: string
  readonly #referenceDir: string
  /** One upload of a digest at a time: a second one waits, and mostly finds the blob there. */
  readonly #uploads = new Map<string, Promise<void>>()

  private constructor(readonly path: string) {
    this.#wholeDir = join(path, 'sha256')
    this.#partialDir = join(path, 'partial')
    this.#referenceDir = join(path, 'references')
  }

  static async open(path: string): Promise<BlobStore> {
    const store = new BlobStore(path)
    for (const dir of [store.#wholeDir, store.#partialDir, store.#referenceDir]) {
      mkdirSync(dir, { recursive: true, mode: 0o700 })
    }
    await store.#removeOldPartials()
    return store
  }

  /** @throws TunemeshError BLOB_CORRUPT where a referenced file has changed since */
  status(digest: string): BlobStatus {
    const name = nameOf(digest)
    const path = join(this.#wholeDir, name)
    const whole = statSync(path, { throwIfNoEntry: false })
    if (whole !== undefined) {
      keepUsed(path, whole.mtimeMs)
      return { complete: true, sizeBytes: whole.size, path }
    }
    const reference = this.#reference(name)
    if (reference !== null) {
      assertUnchanged(digest, reference)
      return { complete: true, sizeBytes: reference.sizeBytes, path: reference.path }
    }
    const partial = statSync(join(this.#partialDir, name), { throwIfNoEntry: false })
    return { complete: false, receivedBytes: partial?.size ?? 0 }
  }

  /** Path of a whole blob. @throws TunemeshError BLOB_NOT_FOUND */
  pathOf(digest: string): string {
    const status = this.status(digest)
    if (status.complete) return status.path
    throw new TunemeshError('BLOB_NOT_FOUND', `Blob ${digest} is not in the store.`)
  }

  read(digest: string, offset = 0): AsyncIterable<Buffer> {
    return createReadStream(this.pathOf(digest), { start: offset, highWaterMark: 1 << 20 })
  }

  /**
   * Takes an upload from `offset` on, which must be where the last one broke (or 0 to begin anew).
   * Every piece is written before the next is asked for.
   */
  async put(
    upload: StoredBlob & { offset: number },
    pieces: AsyncIterable<Uint8Array>,
  ): Promise<StoredBlob> {
    const name = nameOf(upload.digest)
    const before = this.#uploads.get(name) ?? Promise.resolve()
    const { promise: done, resolve: release } = deferred()
    const turn = before.then(() => done)
    this.#uploads.set(name, turn)
    try {
      await before
      return await this.#receive(name, upload, pieces)
    } catch (error) {
      throw diskError(error, `Blob ${upload.digest} of ${upload.sizeBytes} bytes`)
    } finally {
      release()
      if (this.#uploads.get(name) === turn) this.#uploads.delete(name)
    }
  }

  /** Stores bytes made on this machine. */
  async write(pieces: Iterable<Uint8Array> | AsyncIterable<Uint8Array>): Promise<StoredBlob> {
    const temp = join(this.#partialDir, `new-${randomBytes(8).toString('hex')}`)
    try {
      const hash = createHash('sha256')
      const file = await open(temp, 'wx', 0o600)
      const sizeBytes = await writeAll(file, hash, pieces).finally(() => file.close())
      const hex = hash.digest('hex')
      await this.#publish(temp, hex)
      return { digest: `sha256:${hex}`, sizeBytes }
    } catch (error) {
      await rm(temp, { force: true })
      throw diskError(error, 'A blob')
    }
  }

  /**
   * Makes a local file, whose digest the caller has just computed or seen to be still right, a blob
   * without copying it. Changing it later makes the blob corrupt, never wrong.
   */
  async reference(path: string, digest: string): Promise<void> {
    const { size, mtimeMs } = await stat(path)
    const reference: Reference = { path, sizeBytes: size, modifiedMs: mtimeMs }
    writePrivate(join(this.#referenceDir, nameOf(digest)), JSON.stringify(reference))
  }

  async remove(digest: string): Promise<void> {
    const name = nameOf(digest)
    await rm(join(this.#wholeDir, name), { force: true })
    await rm(join(this.#referenceDir, name), { force: true })
  }

  /**
   * Removes the whole blobs that are not among `live` and that nobody has stored or asked for
   * since `beforeMs` of the wall clock. Files that are only referred to are not touched.
   */
  async removeUnused(
    live: ReadonlySet<string>,
    beforeMs: number,
  ): Promise<{ numBlobs: number; sizeBytes: number }> {
    const removed = { numBlobs: 0, sizeBytes: 0 }
    for (const name of await readdir(this.#wholeDir)) {
      if (live.has(`sha256:${name}`)) continue
      const path = join(this.#wholeDir, name)
      // Nothing else of this process comes between the look and the removal.
      const found = statSync(path, { throwIfNoEntry: false })
      if (found === undefined || found.mtimeMs >= beforeMs) continue
      rmSync(path, { force: true })
      removed.numBlobs++
      removed.sizeBytes += found.size
    }
    return removed
  }

  async #receive(
    name: string,
    upload: StoredBlob & { offset: number },
    pieces: AsyncIterable<Uint8Array>,
  ): Promise<StoredBlob> {
    const { digest, sizeBytes, offset } = upload
    if (this.status(digest).complete) return { digest, sizeBytes }
    const path = join(this.#partialDir, name)
    const received = statSync(path, { throwIfNoEntry: false })?.size ?? 0
    if (offset > received) {
      throw new TunemeshError(
        'STATE_CONFLICT',
        `Upload of ${digest} goes on at ${offset}, but only ${received} bytes are here. Ask Stat.`,
      )
    }
    if (received > offset) await truncate(path, offset)
    const hash = await hashOfFile(path, offset)
    const file = await open(path, 'a', 0o600)
    let total = offset
    try {
      total += await writeAll(file, hash, limited(pieces, digest, sizeBytes - offset))
    } finally {
      await file.close()
    }
    if (total < sizeBytes) throw incomplete(digest, total, sizeBytes)
    const found = `sha256:${hash.digest('hex')}`
    if (found !== digest) {
      await rm(path, { force: true })
      throw new TunemeshError(
        'DIGEST_MISMATCH',
        `Upload of ${digest} has the bytes of ${found}. It was dropped; send it again.`,
      )
    }
    await this.#publish(path, name)
    return { digest, sizeBytes }
  }

  /** The rename is durable only when the folder is synced too. */
  async #publish(temp: string, name: string): Promise<void> {
    await rename(temp, join(this.#wholeDir, name))
    await syncFolder(this.#wholeDir)
  }

  #reference(name: string): Reference | null {
    const path = join(this.#referenceDir, name)
    return existsSync(path) ? (JSON.parse(readFileSync(path, 'utf8')) as Reference) : null
  }

  async #removeOldPartials(): Promise<void> {
    for (const name of await readdir(this.#partialDir)) {
      const path = join(this.#partialDir, name)
      const { mtimeMs } = await stat(path)
      const isOwn = name.startsWith('new-')
      if (isOwn || Date.now() - mtimeMs > partialLifeMs) await rm(path, { force: true })
    }
  }
}

export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r')
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}

/** Whoever asks for a blob may be about to name it in a job: it counts as new. */
function keepUsed(path: string, modifiedMs: number): void {
  const now = Date.now()
  if (now - modifiedMs > usedEveryMs) utimesSync(path, now / 1000, now / 1000)
}

function nameOf(digest: string): string {
  const name = digestForm.exec(digest)?.[1]
  if (name !== undefined) return name
  throw new TunemeshError(
    'BLOB_NOT_FOUND',
    `${JSON.stringify(digest.slice(0, 80))} is no digest; the form is sha256:<64 hex digits>.`,
  )
}

async function writeAll(
  file: FileHandle,
  hash: Hash,
  pieces: Iterable<Uint8Array> | AsyncIterable<Uint8Array>,
): Promise<number> {
  let total = 0
  for await (const piece of pieces) {
    hash.update(piece)
    for (let done = 0; done < piece.length; ) {
      done += (await file.write(piece, done, piece.length - done)).bytesWritten
    }
    total += piece.length
  }
  await file.sync()
  return total
}

async function* limited(pieces: AsyncIterable<Uint8Array>, digest: string, limit: number) {
  let total = 0
  for await (const piece of pieces) {
    total += piece.length
    if (total > limit) {
      throw new TunemeshError('BLOB_CORRUPT', `Upload of ${digest} is longer than announced.`)
    }
    yield piece
  }
}

async function hashOfFile(path: string, bytes: number): Promise<Hash> {
  const hash = createHash('sha256')
  if (bytes === 0) return hash
  for await (const piece of createReadStream(path, { end: bytes - 1 })) hash.update(piece)
  return hash
}

function assertUnchanged(digest: string, reference: Reference): void {
  const now = statSync(reference.path, { throwIfNoEntry: false })
  if (now?.size === reference.sizeBytes && now.mtimeMs === reference.modifiedMs) return
  throw new TunemeshError(
    'BLOB_CORRUPT',
    `${reference.path}, which blob ${digest} refers to, was changed or removed. Put it back.`,
  )
}

const incomplete = (digest: string, total: number, sizeBytes: number) =>
  new TunemeshError(
    'BLOB_CORRUPT',
    `Upload of ${digest} ended at ${total} of ${sizeBytes} bytes. Ask Stat and go on from there.`,
  )

function deferred() {
  let resolve = () => {}
  const promise = new Promise<void>((done) => {
    resolve = done
  })
  return { promise, resolve }
}
