/**
 * Checkpoints: a state blob and a manifest with its digests, written last. A checkpoint exists once
 * the commit log names its manifest; the newest ones are kept, the others' bytes removed.
 */
import { createHash, randomBytes } from 'node:crypto'
import { existsSync } from 'node:fs'
import { mkdir, open, readdir, readFile, rename, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { diskError } from '../proto/disk-error.js'
import { TunemeshError } from '../proto/errors.js'
import { type BlobStore, syncFolder } from './blob-store.js'
import type { CheckpointManifest } from './run-events.js'

export class CheckpointStore {
  constructor(private readonly blobs: BlobStore) {}

  /**
   * Makes the manifest durable: temporary folder → fsync → rename → fsync of the folder above.
   * @returns the manifest's digest, for the commit log
   */
  async store(manifest: CheckpointManifest): Promise<string> {
    const text = JSON.stringify(manifest)
    const digest = `sha256:${createHash('sha256').update(text).digest('hex')}`
    const dir = this.#dirOf(manifest.jobId)
    const temp = join(dir, `.part-${randomBytes(6).toString('hex')}`)
    try {
      this.#assertStateThere(manifest)
      await mkdir(temp, { recursive: true, mode: 0o700 })
      const file = await open(join(temp, 'manifest.json'), 'wx', 0o600)
      try {
        await file.writeFile(text)
        await file.sync()
      } finally {
        await file.close()
      }
      await syncFolder(temp)
      const place = join(dir, folderName(manifest.step))
      // Of a run that was rolled back, or of one that died before the log named it.
      await rm(place, { recursive: true, force: true })
      await rename(temp, place)
      await syncFolder(dir)
      return digest
    } catch (error) {
      await rm(temp, { recursive: true, force: true })
      throw diskError(error, `The checkpoint of step ${manifest.step} of job ${manifest.jobId}`)
    }
  }

  /**
   * Removes all but the newest `limit` checkpoints, at least two: the newest may be found corrupt.
   * To be called after the log has the newest one.
   */
  async removeOld(jobId: string, limit: number): Promise<void> {
    const keep = Math.max(2, limit)
    const manifests = await this.#manifests(jobId)
    const kept = manifests.slice(0, keep)
    const keptStates = new Set(kept.map((manifest) => manifest.stateDigest))
    for (const old of manifests.slice(keep)) {
      await rm(join(this.#dirOf(jobId), folderName(old.step)), { recursive: true, force: true })
      if (!keptStates.has(old.stateDigest)) await this.blobs.remove(old.stateDigest)
    }
  }

  /** States of every checkpoint kept, of all jobs. */
  async stateDigests(): Promise<string[]> {
    const dir = join(this.blobs.path, 'checkpoints')
    const jobIds = existsSync(dir) ? await readdir(dir) : []
    const digests: string[] = []
    for (const jobId of jobIds) {
      for (const { stateDigest } of await this.#manifests(jobId)) digests.push(stateDigest)
    }
    return digests
  }

  /** Newest first. */
  async #manifests(jobId: string): Promise<CheckpointManifest[]> {
    const dir = this.#dirOf(jobId)
    const names = (await readdir(dir).catch(() => [])).filter((name) => name.startsWith('step-'))
    const manifests: CheckpointManifest[] = []
    for (const name of names.sort().reverse()) {
      const text = await readFile(join(dir, name, 'manifest.json'), 'utf8')
      manifests.push(JSON.parse(text) as CheckpointManifest)
    }
    return manifests
  }

  #assertStateThere(manifest: CheckpointManifest): void {
    const status = this.blobs.status(manifest.stateDigest)
    if (status.complete && status.sizeBytes === manifest.sizeBytes) return
    throw new TunemeshError(
      'BLOB_NOT_FOUND',
      `The state of step ${manifest.step} (${manifest.stateDigest}, ${manifest.sizeBytes} bytes) ` +
        'is not in the blob store as announced.',
    )
  }

  #dirOf(jobId: string): string {
    return join(this.blobs.path, 'checkpoints', jobId)
  }
}

/** Sorts by step as text. */
const folderName = (step: number) => `step-${String(step).padStart(10, '0')}`
