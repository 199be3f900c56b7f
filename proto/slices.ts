/**
 * Slices: fixed ranges of the trainable vector, in canonical blocks of 256 elements. The same for
 * every worker and every fleet; who owns a slice changes, where it lies does not.
 */
import { TunemeshError } from './errors.js'

const elementsPerBlock = 256
const maxSlices = 256
const minSlices = 8
const bytesPerSlice = 4 << 20
/** Header and payload of a frame stay below what a default nats-server takes: 1 MiB. */
export const maxChunkBlocks = 256

export interface SliceLayout {
  numBlocks: number
  sliceBlocks: number
  chunkBlocks: number
}

export interface BlockRange {
  firstBlock: number
  numBlocks: number
}

export const numSlices = (layout: Pick<SliceLayout, 'numBlocks' | 'sliceBlocks'>): number =>
  Math.ceil(layout.numBlocks / layout.sliceBlocks)

/** Blocks of one slice; the last slice may be shorter. */
export function sliceRange(layout: SliceLayout, slice: number): BlockRange {
  const firstBlock = slice * layout.sliceBlocks
  if (slice < 0 || firstBlock >= layout.numBlocks) {
    throw new TunemeshError(
      'INTERNAL',
      `slice ${slice} lies outside the vector: it has ${numSlices(layout)} slices`,
    )
  }
  return { firstBlock, numBlocks: Math.min(layout.sliceBlocks, layout.numBlocks - firstBlock) }
}

export const numChunks = (layout: SliceLayout, slice: number): number =>
  Math.ceil(sliceRange(layout, slice).numBlocks / layout.chunkBlocks)

/** Blocks of one frame's payload. */
export function chunkRange(layout: SliceLayout, slice: number, chunk: number): BlockRange {
  const range = sliceRange(layout, slice)
  const offset = chunk * layout.chunkBlocks
  return {
    firstBlock: range.firstBlock + offset,
    numBlocks: Math.min(layout.chunkBlocks, range.numBlocks - offset),
  }
}

/** Slices of about 4 MiB of float32, between 8 and 256 of them; never a function of the fleet. */
export function planSlices(numBlocks: number): SliceLayout {
  const bytes = numBlocks * elementsPerBlock * 4
  const wanted = Math.min(maxSlices, Math.max(minSlices, Math.ceil(bytes / bytesPerSlice)))
  const sliceBlocks = Math.max(1, Math.ceil(numBlocks / wanted))
  return { numBlocks, sliceBlocks, chunkBlocks: Math.min(maxChunkBlocks, sliceBlocks) }
}
