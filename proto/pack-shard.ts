/**
 * A tokenised dataset as one blob: safetensors with int32 tensors.
 *
 *   tokens, targets   [numTokens]      all packs one after another; targets are already shifted:
 *                                      targets[i] is what position i must predict, -100 where
 *                                      nothing is trained
 *   pack_offsets      [numPacks + 1]   where each pack starts in `tokens`
 *   document_starts   [numDocuments + numPacks]  per pack: its documents' starts, relative to the
 *                                      pack, and its length
 *   document_offsets  [numPacks + 1]   where each pack's entries start in `document_starts`
 *
 * With packing every pack has exactly T tokens (the rest filled: token 0, target -100, a document
 * of its own).
 */
import { TunemeshError } from './errors.js'

export interface PackShard {
  tokens: Int32Array
  targets: Int32Array
  packOffsets: Int32Array
  documentStarts: Int32Array
  documentOffsets: Int32Array
}

/** One pack: views into the shard. */
export interface Pack {
  tokens: Int32Array
  targets: Int32Array
  /** Ascending starts, last = tokens.length. */
  documentStarts: Int32Array
}

/** Not trained. */
export const noTarget = -100

const tensorNames = {
  tokens: 'tokens',
  targets: 'targets',
  packOffsets: 'pack_offsets',
  documentStarts: 'document_starts',
  documentOffsets: 'document_offsets',
} as const satisfies Record<keyof PackShard, string>

const fields = Object.keys(tensorNames) as (keyof PackShard)[]

/** A header of five short entries is a few hundred bytes; more is not ours. */
const maxHeaderBytes = 4096

export const numPacks = (shard: PackShard): number => shard.packOffsets.length - 1

/** Pack `index` of a shard, without a copy. */
export function packAt(shard: PackShard, index: number): Pack {
  const [start, end] = [shard.packOffsets[index], shard.packOffsets[index + 1]]
  const [first, last] = [shard.documentOffsets[index], shard.documentOffsets[index + 1]]
  if (start === undefined || end === undefined || first === undefined || last === undefined) {
    throw new RangeError(`pack ${index} of a shard of ${numPacks(shard)} packs`)
  }
  return {
    tokens: shard.tokens.subarray(start, end),
    targets: shard.targets.subarray(start, end),
    documentStarts: shard.documentStarts.subarray(first, last),
  }
}

/** The bytes of a shard, in pieces that are views of its arrays. */
export function packShardBytes(shard: PackShard): Uint8Array[] {
  const header: Record<string, unknown> = { __metadata__: { format: 'tunemesh.packs.1' } }
  let offset = 0
  for (const field of fields) {
    const end = offset + shard[field].byteLength
    header[tensorNames[field]] = {
      dtype: 'I32',
      shape: [shard[field].length],
      data_offsets: [offset, end],
    }
    offset = end
  }
  // Spaces fill the header so that the tensors start at a multiple of eight bytes.
  const text = JSON.stringify(header)
  const padded = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8))
  const size = Buffer.alloc(8)
  size.writeBigUInt64LE(BigInt(padded.length))
  const views = fields.map(
    (field) =>
      new Uint8Array(shard[field].buffer, shard[field].byteOffset, shard[field].byteLength),
  )
  return [size, padded, ...views]
}

/** Reads a shard and checks that its offsets agree with each other. Throws BLOB_CORRUPT. */
export function readPackShard(bytes: Uint8Array): PackShard {
  const file = readHeader(bytes)
  const shard = Object.fromEntries(
    fields.map((field) => [field, int32Tensor(file, tensorNames[field])]),
  ) as unknown as PackShard
  checkShard(shard)
  return shard
}

interface ShardFile {
  bytes: Uint8Array
  entries: Record<string, unknown>
  dataStart: number
}

function readHeader(bytes: Uint8Array): ShardFile {
  if (bytes.byteLength < 8) throw corrupt(`has ${bytes.byteLength} bytes, less than a header`)
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  const headerBytes = Number(view.getBigUint64(0, true))
  const limit = Math.min(maxHeaderBytes, bytes.byteLength - 8)
  if (headerBytes > limit) throw corrupt(`has a header of ${headerBytes} bytes, at most ${limit}`)
  try {
    const text = new TextDecoder('utf-8', { fatal: true }).decode(
      bytes.subarray(8, 8 + headerBytes),
    )
    const entries = JSON.parse(text) as Record<string, unknown>
    return { bytes, entries, dataStart: 8 + headerBytes }
  } catch (cause) {
    throw corrupt('has a header that is not JSON', cause)
  }
}

function int32Tensor({ bytes, entries, dataStart }: ShardFile, name: string): Int32Array {
  const entry = entries[name] as
    | { dtype?: unknown; shape?: unknown; data_offsets?: unknown }
    | undefined
  const shape = entry?.shape
  const offsets = entry?.data_offsets
  if (entry?.dtype !== 'I32' || !isIntegers(shape, 1) || !isIntegers(offsets, 2)) {
    throw corrupt(`has no int32 tensor "${name}" of one dimension`)
  }
  const [start, end] = [Number(offsets[0]), Number(offsets[1])]
  const dataBytes = bytes.byteLength - dataStart
  if (end > dataBytes || end - start !== 4 * Number(shape[0])) {
    throw corrupt(
      `has "${name}" at bytes ${start} to ${end} of ${dataBytes} for ${shape[0]} elements`,
    )
  }
  const from = bytes.byteOffset + dataStart + start
  // An Int32Array must start at a multiple of four; a shard inside a larger buffer may not.
  return from % 4 === 0
    ? new Int32Array(bytes.buffer, from, (end - start) / 4)
    : new Int32Array(Uint8Array.from(bytes.subarray(dataStart + start, dataStart + end)).buffer)
}

const isIntegers = (value: unknown, length: number): value is number[] =>
  Array.isArray(value) &&
  value.length === length &&
  value.every((item) => Number.isSafeInteger(item) && (item as number) >= 0)

function checkShard(shard: PackShard): void {
  const { tokens, targets, packOffsets, documentStarts, documentOffsets } = shard
  if (tokens.length !== targets.length) {
    throw corrupt(`has ${tokens.length} tokens and ${targets.length} targets`)
  }
  if (packOffsets.length === 0 || packOffsets.length !== documentOffsets.length) {
    throw corrupt(`has ${packOffsets.length} pack and ${documentOffsets.length} document offsets`)
  }
  checkAscending(packOffsets, tokens.length, 'pack_offsets')
  checkAscending(documentOffsets, documentStarts.length, 'document_offsets')
  for (let index = 0; index < numPacks(shard); index += 1) {
    const pack = packAt(shard, index)
    checkAscending(pack.documentStarts, pack.tokens.length, `document_starts of pack ${index}`)
  }
}

function checkAscending(offsets: Int32Array, last: number, name: string): void {
  const isAscending = offsets.every((offset, i) => i === 0 || offset > (offsets[i - 1] ?? 0))
  if (offsets[0] !== 0 || offsets.at(-1) !== last || !isAscending) {
    throw corrupt(`has ${name} that do not ascend from 0 to ${last}`)
  }
}

const corrupt = (problem: string, cause?: unknown): TunemeshError =>
  new TunemeshError('BLOB_CORRUPT', `The shard of packs ${problem}. Submit the job again.`, {
    cause,
  })
