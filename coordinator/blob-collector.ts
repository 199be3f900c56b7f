/**
 * Removes blobs that nothing refers to any more: datasets of plans, snapshots for joiners, uploads
 * that no job came to name. Live is what any job's record, prepared job or kept checkpoint names;
 * where one of these cannot be read, nothing is removed.
 */
import type { Logger } from 'pino'
import type { BlobStore } from './blob-store.js'
import type { CheckpointStore } from './checkpoint-store.js'
import type { JobRecord, JobStore } from './job-store.js'
import { loadPrepared } from './prepared-blob.js'

/** A blob may be named a while after it was stored or asked for: an ingest, a plan, an upload. */
export const unnamedLifeMs = 24 * 3_600_000

export interface BlobCollectorOptions {
  blobs: BlobStore
  checkpoints: CheckpointStore
  store: Pick<JobStore, 'list'>
  wallMs: () => number
  log: Logger
}

export class BlobCollector {
  /** What a prepared job names never changes, and it is long to read. */
  readonly #named = new Map<string, string[]>()
  #underWay: Promise<void> | null = null

  constructor(private readonly options: BlobCollectorOptions) {}

  /** One at a time; a call while one is under way gets that one. Never rejects. */
  collect(): Promise<void> {
    this.#underWay ??= this.#collect()
      .catch((err) => this.options.log.warn({ err }, 'unused blobs were left where they are'))
      .finally(() => {
        this.#underWay = null
      })
    return this.#underWay
  }

  async #collect(): Promise<void> {
    const { blobs, checkpoints, store, wallMs, log } = this.options
    const live = new Set(await checkpoints.stateDigests())
    for (const job of store.list()) for (const digest of await this.#namedBy(job)) live.add(digest)
    const removed = await blobs.removeUnused(live, wallMs() - unnamedLifeMs)
    if (removed.numBlobs > 0) log.info(removed, 'removed blobs that no job refers to')
  }

  async #namedBy(job: JobRecord): Promise<string[]> {
    const own = [job.preparedDigest, job.adapterDigest, ...job.artifacts.map((a) => a.digest ?? '')]
    if (job.preparedDigest === '') return own
    const named =
      this.#named.get(job.preparedDigest) ?? (await this.#namedByPrepared(job.preparedDigest))
    this.#named.set(job.preparedDigest, named)
    return [...own, ...named]
  }

  async #namedByPrepared(digest: string): Promise<string[]> {
    const { train, validation, validations } = await loadPrepared(this.options.blobs, digest)
    const datasets = [train, validation, ...validations.map(({ dataset }) => dataset)]
    return datasets.flatMap((dataset) => (dataset ? [dataset.shard.digest] : []))
  }
}
