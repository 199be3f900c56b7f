/**
 * A job's bulk files on this worker: read in place on the coordinator's machine, else fetched by
 * digest.
 */
import { existsSync } from 'node:fs'
import { copyFile, mkdir, readdir, readFile, rm, stat } from 'node:fs/promises'
import { join } from 'node:path'
import type { Blobs } from '../client/blobs.js'
import { type PackShard, readPackShard } from '../proto/pack-shard.js'

export interface StoredFile {
  path: string
  digest: string
  sizeBytes: number
}

/** Model files that belong beside trained weights, so that the folder is complete. */
const companionFiles = new Set([
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'chat_template.jinja',
  'merges.txt',
])

export class JobFiles {
  constructor(
    private readonly blobs: Blobs,
    /** This worker's own folder; emptied by `clear`. */
    readonly workDir: string,
  ) {}

  /** Path of a blob's bytes, on this machine when the call returns. */
  async pathOf(digest: string): Promise<string> {
    const known = await this.blobs.stat(digest)
    if (known.localPath !== '' && existsSync(known.localPath)) return known.localPath
    const path = join(this.workDir, 'blobs', digest.replace(':', '-'))
    if (!existsSync(path)) await this.blobs.fetch(digest, path)
    return path
  }

  async packShard(digest: string): Promise<PackShard> {
    return readPackShard(await readFile(await this.pathOf(digest)))
  }

  /** Uploads one file and answers with its digest. */
  async store(path: string): Promise<StoredFile> {
    const { size } = await stat(path)
    return { path, digest: await this.blobs.put(path), sizeBytes: size }
  }

  /** Uploads every file of a folder; paths are relative to it. */
  async storeFolder(folder: string): Promise<StoredFile[]> {
    const names = (await readdir(folder)).sort()
    const stored: StoredFile[] = []
    for (const name of names) stored.push({ ...(await this.store(join(folder, name))), path: name })
    return stored
  }

  async freshFolder(name: string): Promise<string> {
    const folder = join(this.workDir, name)
    await rm(folder, { recursive: true, force: true })
    await mkdir(folder, { recursive: true })
    return folder
  }

  /** Config and tokenizer of the base model, for a folder with all its weights trained. */
  async copyCompanions(modelPath: string, folder: string): Promise<void> {
    if (modelPath.endsWith('.gguf')) return
    for (const name of await readdir(modelPath)) {
      if (companionFiles.has(name)) await copyFile(join(modelPath, name), join(folder, name))
    }
  }

  async clear(): Promise<void> {
    await rm(this.workDir, { recursive: true, force: true })
  }
}
