/**
 * A job's bulk files on this worker: read in place on the coordinator's machine, else fetched by
 * digest.
 */
import { existsSync } from 'node:fs'
import { copyFile, mkdir, readdir, readFile, rm, stat } from 'node:fs/promises'
import { basename, join } from 'node:path'
import type { Blobs, OnProgress } from '../client/blobs.js'
import { companionFiles } from '../proto/model-file.js'
import { type PackShard, readPackShard } from '../proto/pack-shard.js'
import type { ModelCache, ModelPlace, OnMoved } from './model-cache.js'

export interface StoredFile {
  path: string
  digest: string
  sizeBytes: number
}

export interface JobFilesOptions {
  blobs: Blobs
  /** This worker's own folder; emptied by `clear`. */
  workDir: string
  models: ModelCache
  /** How long a transfer waits for a coordinator that is away. */
  patienceMs: number
  onMoved: OnMoved
}

export class JobFiles {
  /** Transfers under way; aborted where nobody wants their files any more. */
  #wanted = new AbortController()

  constructor(private readonly options: JobFilesOptions) {}

  /** Where to read a model or an adapter; fetched first where it is not on this machine. */
  place(place: ModelPlace, signal = this.#wanted.signal): Promise<string> {
    const { models, onMoved } = this.options
    return models.find(place, { signal, onMoved })
  }

  /** Path of a blob's bytes, on this machine when the call returns. */
  async pathOf(digest: string): Promise<string> {
    const { blobs, patienceMs, onMoved } = this.options
    const { localPath } = await blobs.stat(digest)
    // Named after its bytes, so it has them, in whatever mesh's folder on this machine.
    const isNamed = digest === `sha256:${basename(localPath)}`
    if (isNamed && existsSync(localPath)) return localPath
    const path = this.#fetchedPath(digest)
    if (existsSync(path)) return path
    const onProgress = movedBy(onMoved, 'fetching data')
    await blobs.fetch(digest, path, { signal: this.#wanted.signal, patienceMs, onProgress })
    return path
  }

  async packShard(digest: string): Promise<PackShard> {
    return readPackShard(await readFile(await this.pathOf(digest)))
  }

  /** Uploads one file and answers with its digest. */
  async store(path: string): Promise<StoredFile> {
    const { blobs, onMoved } = this.options
    const { size } = await stat(path)
    const { signal } = this.#wanted
    const onProgress = movedBy(onMoved, 'sending a file')
    return { path, digest: await blobs.put(path, { signal, onProgress }), sizeBytes: size }
  }

  /** Uploads every file of a folder; paths are relative to it. */
  async storeFolder(folder: string): Promise<StoredFile[]> {
    const names = (await readdir(folder)).sort()
    const stored: StoredFile[] = []
    for (const name of names) stored.push({ ...(await this.store(join(folder, name))), path: name })
    return stored
  }

  async freshFolder(name: string): Promise<string> {
    const folder = join(this.options.workDir, name)
    await rm(folder, { recursive: true, force: true })
    await mkdir(folder, { recursive: true })
    return folder
  }

  /** Config and tokenizer of the base model, for a folder with all its weights trained. */
  async copyCompanions(model: ModelPlace, folder: string): Promise<void> {
    if (model.path.endsWith('.gguf')) return
    const modelPath = await this.place(model)
    for (const name of await readdir(modelPath)) {
      if (companionFiles.has(name)) await copyFile(join(modelPath, name), join(folder, name))
    }
  }

  /** Nobody wants the files that are under way: a job was released, or the worker ends. */
  abort(): void {
    this.#wanted.abort()
    this.#wanted = new AbortController()
  }

  /** A blob that is not read again; one that lies in the coordinator's folder stays there. */
  async drop(digest: string): Promise<void> {
    await rm(this.#fetchedPath(digest), { force: true })
  }

  /** What was fetched and written for a job that has ended. */
  async forgetJob(): Promise<void> {
    for (const name of ['blobs', 'state', 'delivery']) {
      await rm(join(this.options.workDir, name), { recursive: true, force: true })
    }
  }

  #fetchedPath(digest: string): string {
    return join(this.options.workDir, 'blobs', digest.replace(':', '-'))
  }

  async clear(): Promise<void> {
    await rm(this.options.workDir, { recursive: true, force: true })
  }
}

/** From a running total to what came since. */
function movedBy(onMoved: OnMoved, doing: string): OnProgress {
  let before = 0
  return (doneBytes) => {
    onMoved(Math.max(0, doneBytes - before), doing)
    before = doneBytes
  }
}
