/**
 * The files of a base model on this machine: in place where the worker finds the very files that
 * the coordinator has read, else fetched by digest into a cache folder that all workers of the
 * machine share. The least recently used models go when it is full.
 *
 *   <folder>/<hash of names and digests>/<file>     whole, its bytes checked as they arrived
 *                                       /<file>.part  unfinished, gone on with by the next fetch
 *                                       /.fetching    touched by the worker that fetches
 *                                       /.used        touched at each use
 */
import { createHash } from 'node:crypto'
import { accessSync, constants, type Stats } from 'node:fs'
import {
  mkdir,
  open,
  readdir,
  readFile,
  rename,
  rm,
  stat,
  statfs,
  symlink,
  utimes,
  writeFile,
} from 'node:fs/promises'
import { basename, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { type Blobs, digestOf } from '../client/blobs.js'
import { TunemeshError } from '../proto/errors.js'
import { fileStamp, type ModelFile } from '../proto/model-file.js'

/** Where the coordinator has it, and what lies there. */
export interface ModelPlace {
  /** A folder, or the one .gguf file. */
  path: string
  files: readonly ModelFile[]
}

/** Bytes hashed, fetched or sent since the last call, and what that is for. */
export type OnMoved = (numBytes: number, doing: string) => void

export interface FindOptions {
  signal: AbortSignal
  onMoved: OnMoved
}

export interface ModelCacheOptions {
  blobs: Pick<Blobs, 'fetch'>
  folder: string
  /** How long a fetch waits for a coordinator that is away. */
  patienceMs: number
  /** Most that the cache holds; null: `shareOfDisk` of its disk. */
  maxBytes: number | null
  log(level: 'info' | 'warn', message: string): void
}

const shareOfDisk = 0.75
const touchEveryMs = 2_000
/** A fetch that nobody has touched for so long has died. */
const staleAfterMs = 10_000
const lookEveryMs = 250
/** Digests of local copies that are remembered; beyond it all are forgotten and computed again. */
const maxKnown = 1_000

export class ModelCache {
  constructor(private readonly options: ModelCacheOptions) {}

  /**
   * Answers the path to read the model at.
   * @throws TunemeshError MODEL_NOT_FOUND where the files are neither here nor told by digest;
   *   DISK_FULL; DIGEST_MISMATCH; whatever the coordinator answers
   */
  async find(place: ModelPlace, find: FindOptions): Promise<string> {
    const { path, files } = place
    if (files.length === 0) return path
    for (const { name } of files) assertPlain(name)
    const pathsHere = new Map<string, string>()
    for (const file of files) {
      const local = isSingle(place) ? path : join(path, file.name)
      if (await this.#isHere(local, file, find)) pathsHere.set(file.name, local)
    }
    if (pathsHere.size === files.length) return path
    const absent = files.filter(({ name }) => !pathsHere.has(name))
    if (absent.some(({ digest }) => digest === '')) throw unreadable(path, absent)
    return this.#gather(place, pathsHere, find)
  }

  /** A folder of what had to be fetched and links to what is here. */
  async #gather(
    place: ModelPlace,
    pathsHere: ReadonlyMap<string, string>,
    find: FindOptions,
  ): Promise<string> {
    const { files } = place
    const folder = join(this.options.folder, keyOf(files))
    await mkdir(folder, { recursive: true, mode: 0o700 })
    await writeFile(join(folder, '.used'), '')
    const wanted = files.filter(({ name }) => !pathsHere.has(name))
    for (const file of files) {
      const local = pathsHere.get(file.name)
      if (local !== undefined) await link(local, join(folder, file.name))
    }
    const unlock = await this.#lock(folder, wanted, find)
    try {
      await this.#fetchAll(folder, wanted, find)
    } finally {
      await unlock()
    }
    return isSingle(place) ? join(folder, files[0]?.name ?? '') : folder
  }

  async #fetchAll(folder: string, files: readonly ModelFile[], find: FindOptions): Promise<void> {
    const missing: ModelFile[] = []
    for (const file of files) if (!(await isWhole(folder, file))) missing.push(file)
    if (missing.length === 0) return
    const sizeBytes = missing.reduce((sum, file) => sum + file.sizeBytes, 0)
    await this.#makeRoom(folder, missing)
    const { blobs, patienceMs, log } = this.options
    log('info', `fetching ${missing.length} files, ${gib(sizeBytes)}, from the coordinator`)
    const tell = progressLines(sizeBytes, (line) => log('info', line))
    for (const { name, digest } of missing) {
      let before = 0
      await blobs.fetch(digest, join(folder, name), {
        signal: find.signal,
        patienceMs,
        onProgress: (done, total) => {
          find.onMoved(done - before, `fetching ${name}: ${gib(done)} of ${gib(total)}`)
          tell(done - before)
          before = done
        },
      })
    }
    log('info', `fetched the model's files into ${folder}`)
  }

  /** Waits while another worker of this machine fetches the same files. Answers how to unlock. */
  async #lock(
    folder: string,
    wanted: readonly ModelFile[],
    { signal, onMoved }: FindOptions,
  ): Promise<() => Promise<void>> {
    const path = join(folder, '.fetching')
    let seenBytes = await bytesIn(folder)
    for (;;) {
      signal.throwIfAborted()
      const file = await open(path, 'wx').catch((error: NodeJS.ErrnoException) => {
        if (error.code === 'EEXIST') return null
        throw error
      })
      if (file !== null) {
        await file.close()
        const timer = setInterval(() => void touch(path), touchEveryMs)
        return async () => {
          clearInterval(timer)
          await rm(path, { force: true })
        }
      }
      const lock = await statOf(path)
      if (lock !== null && Date.now() - lock.mtimeMs > staleAfterMs) await rm(path, { force: true })
      const bytes = await bytesIn(folder)
      onMoved(Math.max(0, bytes - seenBytes), `another worker fetches ${wanted.length} files`)
      seenBytes = bytes
      await delay(lookEveryMs, undefined, { signal })
    }
  }

  /** Removes the models used longest ago, never one that is being fetched. */
  async #makeRoom(folder: string, missing: readonly ModelFile[]): Promise<void> {
    let needed = 0
    for (const file of missing) needed += file.sizeBytes - (await partBytes(folder, file))
    const disk = await statfs(this.options.folder)
    const limit = this.options.maxBytes ?? disk.blocks * disk.bsize * shareOfDisk
    const free = disk.bavail * disk.bsize
    const others = await this.#others(folder)
    const held = (await bytesIn(folder)) + others.reduce((sum, other) => sum + other.sizeBytes, 0)
    let removedBytes = 0
    const fits = () => held - removedBytes + needed <= limit && free + removedBytes >= needed
    const removed: string[] = []
    for (const other of others) {
      if (fits()) break
      removed.push(other.folder)
      removedBytes += other.sizeBytes
    }
    if (fits()) {
      for (const other of removed) {
        await rm(other, { recursive: true, force: true })
        this.options.log('info', `removed ${other} from the model cache to make room`)
      }
      return
    }
    throw new TunemeshError(
      'DISK_FULL',
      `The model's files need ${gib(needed)} more in ${this.options.folder}: its disk has ` +
        `${gib(free)} free, and the cache may hold ${gib(limit)}, of which ${gib(held)} are ` +
        'taken by models. Free some space, or set XDG_CACHE_HOME to a larger disk.',
    )
  }

  /** Other models of the cache that may go, the one used longest ago first. */
  async #others(own: string): Promise<{ folder: string; sizeBytes: number; usedMs: number }[]> {
    const found = []
    for (const name of await readdir(this.options.folder)) {
      const folder = join(this.options.folder, name)
      const used = await statOf(join(folder, '.used'))
      if (folder === own || used === null) continue
      const lock = await statOf(join(folder, '.fetching'))
      if (lock !== null && Date.now() - lock.mtimeMs <= staleAfterMs) continue
      found.push({ folder, sizeBytes: await bytesIn(folder), usedMs: used.mtimeMs })
    }
    return found.sort((a, b) => a.usedMs - b.usedMs)
  }

  /** Is this file the one that the coordinator means? */
  async #isHere(path: string, file: ModelFile, find: FindOptions): Promise<boolean> {
    const stats = await statOf(path)
    if (stats === null || !stats.isFile() || stats.size !== file.sizeBytes) return false
    if (!isReadable(path)) return false
    if (fileStamp(stats) === file.stamp) return true
    if (file.digest === '') return false
    const digest = await this.#digestHere(path, stats, find)
    if (digest === file.digest) return true
    this.options.log('warn', `${path} is not the coordinator's file of that name: its bytes differ`)
    return false
  }

  /** Remembered for all workers of the machine: a large model takes long to hash. */
  async #digestHere(path: string, stats: Stats, find: FindOptions): Promise<string> {
    const folder = join(this.options.folder, 'known')
    const record = join(folder, createHash('sha256').update(path).digest('hex').slice(0, 32))
    const known = await readKnown(record)
    if (known?.stamp === fileStamp(stats)) return known.digest
    const { signal, onMoved } = find
    const doing = `checking ${basename(path)}`
    const onBytes = (numBytes: number) => onMoved(numBytes, doing)
    const digest = await digestOf(path, { signal, onBytes })
    await mkdir(folder, { recursive: true, mode: 0o700 })
    if ((await readdir(folder)).length >= maxKnown) {
      await rm(folder, { recursive: true, force: true })
      await mkdir(folder, { recursive: true, mode: 0o700 })
    }
    const temporary = `${record}.${process.pid}`
    await writeFile(temporary, JSON.stringify({ stamp: fileStamp(stats), digest }))
    await rename(temporary, record)
    return digest
  }
}

const isSingle = ({ path, files }: ModelPlace) => files.length === 1 && path.endsWith('.gguf')

const keyOf = (files: readonly ModelFile[]) =>
  createHash('sha256')
    .update(files.map(({ name, digest }) => `${name} ${digest}\n`).join(''))
    .digest('hex')
    .slice(0, 32)

function assertPlain(name: string): void {
  if (name !== '' && name === basename(name) && !name.startsWith('.')) return
  throw new TunemeshError('MODEL_INVALID', `${JSON.stringify(name)} is no name of a model's file.`)
}

const unreadable = (path: string, absent: readonly ModelFile[]) =>
  new TunemeshError(
    'MODEL_NOT_FOUND',
    `This worker cannot read ${absent.map(({ name }) => name).join(', ')} of ${path} as the ` +
      'coordinator knows it, and was told no digest to fetch it by. Name a job, or put it there.',
  )

/** A tenth of the whole at a time. */
function progressLines(totalBytes: number, tell: (line: string) => void) {
  let done = 0
  let toldTenths = 0
  return (numBytes: number) => {
    done += numBytes
    const tenths = Math.floor((done * 10) / totalBytes)
    if (tenths <= toldTenths || done >= totalBytes) return
    toldTenths = tenths
    tell(`fetched ${tenths * 10} % of ${gib(totalBytes)}`)
  }
}

async function link(target: string, path: string): Promise<void> {
  await rm(path, { force: true })
  await symlink(target, path).catch((error: NodeJS.ErrnoException) => {
    // Another worker of the machine has just made it.
    if (error.code !== 'EEXIST') throw error
  })
}

async function isWhole(folder: string, file: ModelFile): Promise<boolean> {
  const stats = await statOf(join(folder, file.name))
  return stats !== null && stats.size === file.sizeBytes
}

const partBytes = async (folder: string, file: ModelFile): Promise<number> =>
  (await statOf(join(folder, `${file.name}.part`)))?.size ?? 0

async function bytesIn(folder: string): Promise<number> {
  let sum = 0
  for (const entry of await readdir(folder, { withFileTypes: true })) {
    if (entry.isFile()) sum += (await statOf(join(folder, entry.name)))?.size ?? 0
  }
  return sum
}

const statOf = (path: string): Promise<Stats | null> => stat(path).catch(() => null)

function isReadable(path: string): boolean {
  try {
    accessSync(path, constants.R_OK)
    return true
  } catch {
    return false
  }
}

async function touch(path: string): Promise<void> {
  const now = Date.now() / 1000
  // Removed as stale, after this process stood still: the other fetch writes the same bytes.
  await utimes(path, now, now).catch(() => {})
}

async function readKnown(path: string): Promise<{ stamp: string; digest: string } | null> {
  try {
    return JSON.parse(await readFile(path, 'utf8')) as { stamp: string; digest: string }
  } catch {
    return null // none yet
  }
}

function gib(bytes: number): string {
  return bytes < 2 ** 30
    ? `${(bytes / 2 ** 20).toFixed(1)} MiB`
    : `${(bytes / 2 ** 30).toFixed(1)} GiB`
}
