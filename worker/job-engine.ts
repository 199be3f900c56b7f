/**
 * One job on this worker's engine: its data, its weights, and the operations that the run machine
 * asks for.
 */
import { createHash } from 'node:crypto'
import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { emptyPack } from '../proto/data-order.js'
import { TunemeshError } from '../proto/errors.js'
import type { Deliver__Output } from '../proto/gen/tunemesh/v1/Deliver.js'
import type { Delivered } from '../proto/gen/tunemesh/v1/Delivered.js'
import type { Prepare__Output } from '../proto/gen/tunemesh/v1/Prepare.js'
import { numPacks, type PackShard, packAt } from '../proto/pack-shard.js'
import type { TrainRequest } from '../proto/train-spec.js'
import type { DeviceOptions } from './device.js'
import {
  type Engine,
  type MemoryPlan,
  type MicroBatchResult,
  type MicroBatchTarget,
  openEngine,
  type SliceListener,
  type TokenBatch,
  type TrainedTensor,
  type UpdateNumbers,
} from './engine.js'
import { ExchangeBuffers } from './exchange-buffers.js'
import type { JobFiles, StoredFile } from './job-files.js'
import type { ModelPlace } from './model-cache.js'

/** What the coordinator hears of a job that is ready to train. */
export interface ReadyJob {
  planHash: string
  memory: MemoryPlan
  weightsSha256: string
}

/**
 * Replicas prove that they are equal at every so many steps; hashing all weights each step would
 * cost more.
 */
const digestEverySteps = 10

export class JobEngine {
  /** Contributions, sums and frames, in the engine's own memory. */
  readonly exchange: ExchangeBuffers

  private constructor(
    readonly prepare: Prepare__Output,
    readonly engine: Engine,
    private readonly request: TrainRequest,
    private readonly files: JobFiles,
    private readonly train: PackShard,
    private readonly splits: ReadonlyMap<string, PackShard>,
    readonly ready: ReadyJob,
  ) {
    this.exchange = new ExchangeBuffers(engine.exchangeHandle)
  }

  /** Loads model and data, reserves all memory, starts at the job's start weights. */
  static async open(
    prepare: Prepare__Output,
    files: JobFiles,
    device: DeviceOptions,
  ): Promise<JobEngine> {
    const request = JSON.parse(prepare.trainSpecJson) as TrainRequest
    const train = await files.packShard(prepare.datasetDigest)
    const splits = new Map<string, PackShard>()
    for (const { name, digest } of prepare.splits) splits.set(name, await files.packShard(digest))
    const { config, spec } = request
    const { precision, deterministic } = spec
    const modelPath = await files.place(modelPlace(prepare))
    const adapterPath = await files.place({
      path: prepare.adapterPath,
      files: prepare.adapterFiles,
    })
    const engine = openEngine({ modelPath, config, precision, deterministic, ...device })
    try {
      await engine.load()
      const { memory, tensors } = await engine.prepare(spec)
      if (adapterPath) await engine.loadAdapter(adapterPath)
      const ready = {
        planHash: planHashOf(request, tensors),
        memory,
        weightsSha256: await engine.weightsDigest(),
      }
      return new JobEngine(prepare, engine, request, files, train, splits, ready)
    } catch (error) {
      await engine.close()
      throw error
    }
  }

  microBatch(packs: readonly number[], lossDivisor: number, into: MicroBatchTarget) {
    return this.engine.microBatch(batchOf(this.train, packs), lossDivisor, into)
  }

  /** The last one of a contribution; `onSlice` hears of slices that may be sent, before the end. */
  lastMicroBatch(
    packs: readonly number[],
    lossDivisor: number,
    { onSlice, ...into }: MicroBatchTarget & { onSlice: SliceListener },
  ) {
    const noted: SliceListener = (told) => {
      this.exchange.noteSlice(into.slot, told)
      onSlice(told)
    }
    const batch = batchOf(this.train, packs)
    return this.engine.microBatch(batch, lossDivisor, { ...into, onSlice: noted })
  }

  numTokens(packs: readonly number[]): number {
    return batchOf(this.train, packs).tokens.length
  }

  isDigestStep(step: number): boolean {
    return step % digestEverySteps === 0
  }

  /** Linear digest of one micro-batch's gradient, all slices together. */
  async probe(packs: readonly number[], lossDivisor: number, slot: number): Promise<string> {
    await this.exchange.clearSlot(slot)
    const failure = await this.microBatch(packs, lossDivisor, { slot }).then(
      () => null,
      failedGradient,
    )
    if (failure !== null) return failure
    const digests = await this.exchange.contributionDigests(slot)
    await this.exchange.clearSlot(slot)
    const sum = digests.reduce((total, digest) => total + BigInt(`0x${digest}`), 0n)
    return BigInt.asUintN(64, sum).toString(16).padStart(16, '0')
  }

  /** Loss over a whole split, as many packs at a time as the engine planned tokens for. */
  async evaluate(split: string): Promise<MicroBatchResult> {
    const total: MicroBatchResult = { lossSum: 0, numTargetTokens: 0, computeMs: 0, notes: [] }
    const shard = this.splits.get(split)
    if (!shard) return total
    let packs: number[] = []
    let tokens = 0
    const flush = async () => {
      if (packs.length === 0) return
      const part = await this.engine.evaluate(batchOf(shard, packs))
      total.lossSum += part.lossSum
      total.numTargetTokens += part.numTargetTokens
      total.computeMs += part.computeMs
      total.notes.push(...part.notes)
      packs = []
      tokens = 0
    }
    for (let index = 0; index < numPacks(shard); index++) {
      const size = packAt(shard, index).tokens.length
      if (tokens + size > this.request.spec.tokensPerMicroBatch) await flush()
      packs.push(index)
      tokens += size
    }
    await flush()
    return total
  }

  fetchSum(step: number, slice: number): Promise<void> {
    return this.engine.fetchSum(step, slice)
  }

  applyUpdate(step: number, update: UpdateNumbers): Promise<void> {
    return this.engine.applyUpdate(step, update)
  }

  async uploadState(step: number): Promise<StoredFile & { weightsSha256: string }> {
    const folder = await this.files.freshFolder('state')
    const path = join(folder, 'state.safetensors')
    const weightsSha256 = await this.engine.weightsDigest()
    await this.engine.writeState(path, step)
    return { ...(await this.files.store(path)), weightsSha256 }
  }

  async loadState(digest: string): Promise<{ step: number; weightsSha256: string }> {
    const { step } = await this.engine.readState(await this.files.pathOf(digest))
    await this.files.drop(digest)
    return { step, weightsSha256: await this.engine.weightsDigest() }
  }

  /** Adapter folder, or the whole model for `full`, as blobs. */
  async deliver(deliver: Deliver__Output): Promise<Delivered> {
    const folder = await this.files.freshFolder('delivery')
    if (this.request.spec.finetuning === 'full')
      await this.files.copyCompanions(modelPlace(this.prepare), folder)
    await this.engine.writeAdapter(folder, deliver.baseModelName)
    const change = await this.engine.weightChange()
    await writeFile(join(folder, 'weight_change.json'), `${JSON.stringify(change, null, 1)}\n`)
    const artifacts = await this.files.storeFolder(folder)
    return {
      jobId: deliver.jobId,
      artifacts: artifacts.map(({ path, digest, sizeBytes }) => ({ path, digest, sizeBytes })),
      weightsSha256: await this.engine.weightsDigest(),
      weightChangeJson: await readFile(join(folder, 'weight_change.json'), 'utf8'),
    }
  }

  async close(): Promise<void> {
    await this.engine.close()
    await this.files.forgetJob()
  }
}

const modelPlace = ({ modelPath, modelFiles }: Prepare__Output): ModelPlace => ({
  path: modelPath,
  files: modelFiles,
})

/** The place and value of what does not fit an exchange are as good a proof as its digest. */
function failedGradient(error: unknown): string {
  const code = error instanceof TunemeshError ? error.code : null
  if (code !== 'NON_FINITE_GRADIENT' && code !== 'GRADIENT_OUT_OF_RANGE') throw error
  const { message } = error as TunemeshError
  return createHash('sha256').update(`${code} ${message}`).digest('hex').slice(0, 16)
}

/** Packs one after another; an empty pack has no tokens and so adds nothing. */
function batchOf(shard: PackShard, packs: readonly number[]): TokenBatch {
  const parts = packs.filter((index) => index !== emptyPack).map((index) => packAt(shard, index))
  const numTokens = parts.reduce((sum, pack) => sum + pack.tokens.length, 0)
  const tokens = new Int32Array(numTokens)
  const targets = new Int32Array(numTokens)
  const starts: number[] = []
  let offset = 0
  for (const pack of parts) {
    tokens.set(pack.tokens, offset)
    targets.set(pack.targets, offset)
    for (const start of pack.documentStarts.subarray(0, -1)) starts.push(offset + start)
    offset += pack.tokens.length
  }
  starts.push(numTokens)
  return { tokens, targets, documentStarts: Int32Array.from(starts) }
}

/**
 * Two workers may train together only where this is equal: arithmetic, slices, names and shapes.
 */
function planHashOf(request: TrainRequest, tensors: TrainedTensor[]): string {
  const { numContributionSlots: _, ...numeric } = request.spec
  const shapes = tensors.map(({ name, shape, firstBlock }) => [name, shape, firstBlock])
  return createHash('sha256')
    .update(JSON.stringify([request.config, numeric, shapes]))
    .digest('hex')
    .slice(0, 32)
}
