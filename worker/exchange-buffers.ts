/**
 * The gradient memory of a job as the data plane uses it: contributions, the owner's sums,
 * published sums of two steps, frame slabs. Everything that touches elements runs natively on the
 * exchange's own thread; here are only numbers of slots, slices and chunks.
 */
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import { type FrameAddress, maxFrameBytes } from '../proto/frame.js'
import { numChunks, numSlices, type SliceLayout } from '../proto/slices.js'

interface SliceMeasure {
  digest: string
  /** Of all frames of the slice, headers included. */
  packedBytes: number
}

export interface FinishedSlice {
  sumDigest: string
  publishedDigest: string
  sumSquares: number
}

interface PackOrder {
  header: FrameAddress
  chunks: readonly number[]
  /** A frame slot for each chunk. */
  frames: readonly number[]
}

/** What native/bindings/exchange_bindings.cc puts into Engine.exchangeHandle. */
interface NativeExchange extends SliceLayout {
  significantBits: number
  numContributionSlots: number
  frames: ArrayBuffer
  clearSlot(slot: number): Promise<void>
  measureContribution(slot: number, slices: readonly number[]): Promise<SliceMeasure[]>
  packContribution(slot: number, order: PackOrder): Promise<number[]>
  clearSum(slice: number): Promise<void>
  addContributionFrames(frames: readonly Uint8Array[]): Promise<string>
  addOwnContribution(slot: number, slice: number): Promise<string>
  finishSlice(step: number, slice: number): Promise<FinishedSlice>
  packPublished(order: PackOrder): Promise<number[]>
  storePublishedFrames(frames: readonly Uint8Array[]): Promise<void>
  publishedDigest(step: number, slice: number): Promise<string>
  frameFault(frame: Uint8Array): string | null
}

export class ExchangeBuffers {
  readonly layout: SliceLayout
  readonly numSlices: number
  readonly numFrameSlots: number
  readonly #native: NativeExchange
  readonly #frames: Uint8Array
  /** By slot: bytes of each slice that stands. */
  readonly #packedBytes = new Map<number, number[]>()

  /** @param handle Engine.exchangeHandle */
  constructor(handle: object) {
    this.#native = handle as NativeExchange
    const { numBlocks, sliceBlocks, chunkBlocks, frames } = this.#native
    this.layout = { numBlocks, sliceBlocks, chunkBlocks }
    this.numSlices = numSlices(this.layout)
    this.#frames = new Uint8Array(frames)
    this.numFrameSlots = frames.byteLength / maxFrameBytes
  }

  numChunks(slice: number): number {
    return numChunks(this.layout, slice)
  }

  /** The first bytes of a frame slot; overwritten by the slot's next packing. */
  frame(slot: number, bytes: number): Uint8Array {
    return this.#frames.subarray(slot * maxFrameBytes, slot * maxFrameBytes + bytes)
  }

  // ---- contributions ----

  clearSlot(slot: number): Promise<void> {
    this.#packedBytes.delete(slot)
    return answered(this.#native.clearSlot(slot))
  }

  /** Linear digest of each slice of a finished contribution, 16 hex digits, slice 0 first. */
  async contributionDigests(slot: number): Promise<string[]> {
    const slices = Array.from({ length: this.numSlices }, (_, slice) => slice)
    const measures = await answered(this.#native.measureContribution(slot, slices))
    this.#packedBytes.set(
      slot,
      measures.map((measure) => measure.packedBytes),
    )
    return measures.map((measure) => measure.digest)
  }

  /** What the engine told of a slice while it was still at work on the others. */
  noteSlice(slot: number, { slice, packedBytes }: { slice: number; packedBytes: number }): void {
    const bySlice = this.#packedBytes.get(slot) ?? []
    bySlice[slice] = packedBytes
    this.#packedBytes.set(slot, bySlice)
  }

  /** Bytes of a slice's frames; the most they can be where nobody has measured it. */
  packedBytes(slot: number, slice: number): number {
    return this.#packedBytes.get(slot)?.[slice] ?? this.numChunks(slice) * maxFrameBytes
  }

  /** Packs chunks of a slice into frame slots; answers each frame's bytes. */
  packContribution(slot: number, order: PackOrder): Promise<number[]> {
    return answered(this.#native.packContribution(slot, order))
  }

  // ---- the owner's sum ----

  clearSum(slice: number): Promise<void> {
    return answered(this.#native.clearSum(slice))
  }

  /** Every chunk of one contribution's slice, in any order; all are checked before one is added. */
  addContributionFrames(frames: readonly Uint8Array[]): Promise<string> {
    return answered(this.#native.addContributionFrames(frames))
  }

  addOwnContribution(slot: number, slice: number): Promise<string> {
    return answered(this.#native.addOwnContribution(slot, slice))
  }

  /** Rounds the sum into the step's published slot. */
  finishSlice(step: number, slice: number): Promise<FinishedSlice> {
    return answered(this.#native.finishSlice(step, slice))
  }

  // ---- published sums, in slot step % 2 ----

  packPublished(order: PackOrder): Promise<number[]> {
    return answered(this.#native.packPublished(order))
  }

  storePublishedFrames(frames: readonly Uint8Array[]): Promise<void> {
    return answered(this.#native.storePublishedFrames(frames))
  }

  /** Computed from what stands in the slot. */
  publishedDigest(step: number, slice: number): Promise<string> {
    return answered(this.#native.publishedDigest(step, slice))
  }

  /** null, or what is wrong: lengths, ranges, checksum, payload. At once, about 50 µs a MiB. */
  frameFault(frame: Uint8Array): string | null {
    return this.#native.frameFault(frame)
  }
}

/**
 * A slice of a contribution was read after another part of the same gradient had failed: the engine
 * says which, this error adds nothing.
 */
export const isPoisoned = (error: unknown): boolean =>
  error instanceof TunemeshError && error.code === 'NON_FINITE_GRADIENT'

/** Native failures carry a code of proto/errors.ts. */
async function answered<T>(answer: Promise<T>): Promise<T> {
  try {
    return await answer
  } catch (cause) {
    const { code, message } = cause as { code?: unknown; message: string }
    throw new TunemeshError(isErrorCode(code) ? code : 'ENGINE_FAILED', message, { cause })
  }
}
