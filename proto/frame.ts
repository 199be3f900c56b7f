/**
 * What travels on the gradient subjects (proto/subjects.ts): frames of packed integers, and the
 * small messages that grant, acknowledge and ask again.
 *
 * A frame is a 64-byte little-endian header and its payload, 1 MiB at most; no NATS headers.
 *
 *    0 magic u32 "TMG1"    4 version u16      6 kind u8           7 codec u8      8 jobHash u64
 *   16 fleetEpoch u32     20 step u32        24 slice u16        26 sliceAttempt u16
 *   28 lease u16          30 leaseAttempt u16 (both 0 in a sum)  32 chunk u16    34 numChunks u16
 *   36 firstBlock u32     40 numBlocks u32   44 payloadBytes u32
 *   48 digest u64 (linear digest of this chunk's integers)       56 flags u32 (0)
 *   60 crc32c u32 (of bytes 0 to 59 and the payload)
 *
 * The payload is numBlocks pairs (shift u8, width u8), then 32 * width bytes for each block
 * (native/engine/codec.h). native/engine/frame.h reads and writes the same layout; only it computes
 * checksums, and only it looks into payloads. A test keeps the two equal.
 */
import { createHash } from 'node:crypto'
import { TunemeshError } from './errors.js'
import type { JobId, WorkerId } from './ids.js'

export const frameHeaderBytes = 64
/** Header included: what a default nats-server takes. */
export const maxFrameBytes = 1 << 20
const frameVersion = 1

const magic = 0x31474d54

export type FrameKind = 'contribution' | 'sum'
type FrameCodec = 'q24' | 'q12' | 'q8'
const kinds: readonly (FrameKind | undefined)[] = [undefined, 'contribution', 'sum']
const codecs: readonly (FrameCodec | undefined)[] = [undefined, 'q24', 'q12', 'q8']

/** Whose numbers a frame carries; the part of the header that its sender chooses. */
export interface FrameAddress {
  jobHash: bigint
  fleetEpoch: number
  step: number
  slice: number
  sliceAttempt: number
  lease: number
  leaseAttempt: number
}

export interface FrameHeader extends FrameAddress {
  kind: FrameKind
  codec: FrameCodec
  chunk: number
  numChunks: number
  firstBlock: number
  numBlocks: number
  payloadBytes: number
  digest: bigint
  crc32c: number
}

/** First eight bytes of SHA-256 of the job id, little-endian. */
export const jobHash = (job: JobId | string): bigint =>
  createHash('sha256').update(job).digest().readBigUInt64LE(0)

/** The header of a whole frame; lengths and names are checked, the checksum is not. */
export function readFrameHeader(frame: Uint8Array): FrameHeader {
  if (frame.byteLength < frameHeaderBytes || frame.byteLength > maxFrameBytes) {
    throw refusal(`${frame.byteLength} bytes long, not ${frameHeaderBytes} to ${maxFrameBytes}`)
  }
  const view = new DataView(frame.buffer, frame.byteOffset, frameHeaderBytes)
  const kind = kinds[view.getUint8(6)]
  const codec = codecs[view.getUint8(7)]
  if (view.getUint32(0, true) !== magic) throw refusal('not a gradient frame: wrong magic number')
  if (view.getUint16(4, true) !== frameVersion) {
    throw refusal(`of version ${view.getUint16(4, true)}, not ${frameVersion}`)
  }
  if (kind === undefined) throw refusal(`of unknown kind ${view.getUint8(6)}`)
  if (codec === undefined) throw refusal(`of unknown codec ${view.getUint8(7)}`)
  const payloadBytes = view.getUint32(44, true)
  if (payloadBytes !== frame.byteLength - frameHeaderBytes) {
    throw refusal(`${frame.byteLength} bytes long, but its header says ${payloadBytes} of payload`)
  }
  return {
    kind,
    codec,
    jobHash: view.getBigUint64(8, true),
    fleetEpoch: view.getUint32(16, true),
    step: view.getUint32(20, true),
    slice: view.getUint16(24, true),
    sliceAttempt: view.getUint16(26, true),
    lease: view.getUint16(28, true),
    leaseAttempt: view.getUint16(30, true),
    chunk: view.getUint16(32, true),
    numChunks: view.getUint16(34, true),
    firstBlock: view.getUint32(36, true),
    numBlocks: view.getUint32(40, true),
    payloadBytes,
    digest: view.getBigUint64(48, true),
    crc32c: view.getUint32(60, true),
  }
}

/** Writes a header as given, checksum included: for tests and tools; frames are made natively. */
export function writeFrameHeader(header: FrameHeader, frame: Uint8Array): void {
  const view = new DataView(frame.buffer, frame.byteOffset, frameHeaderBytes)
  view.setUint32(0, magic, true)
  view.setUint16(4, frameVersion, true)
  view.setUint8(6, kinds.indexOf(header.kind))
  view.setUint8(7, codecs.indexOf(header.codec))
  view.setBigUint64(8, header.jobHash, true)
  view.setUint32(16, header.fleetEpoch, true)
  view.setUint32(20, header.step, true)
  view.setUint16(24, header.slice, true)
  view.setUint16(26, header.sliceAttempt, true)
  view.setUint16(28, header.lease, true)
  view.setUint16(30, header.leaseAttempt, true)
  view.setUint16(32, header.chunk, true)
  view.setUint16(34, header.numChunks, true)
  view.setUint32(36, header.firstBlock, true)
  view.setUint32(40, header.numBlocks, true)
  view.setUint32(44, header.payloadBytes, true)
  view.setBigUint64(48, header.digest, true)
  view.setUint32(56, 0, true)
  view.setUint32(60, header.crc32c, true)
}

export const isFrame = (message: Uint8Array): boolean =>
  message.byteLength >= 4 &&
  new DataView(message.buffer, message.byteOffset, 4).getUint32(0, true) === magic

export const digestText = (digest: bigint): string =>
  BigInt.asUintN(64, digest).toString(16).padStart(16, '0')

interface ContributionAddress {
  step: number
  slice: number
  sliceAttempt: number
  lease: number
  leaseAttempt: number
}
interface SumAddress {
  step: number
  slice: number
  sliceAttempt: number
}

/**
 * JSON on a worker's credit subject. `from` is the sender; a credit whose subject names another is
 * dropped. Every message may be lost, doubled or late; each is sent again by a timer of the side
 * that waits.
 *
 *   contributor → owner   offer      "I hold this contribution, numChunks frames, so many bytes"
 *   owner → contributor   grant      "send all of it": counts against the owner's 16 MiB until it
 *   is added or dropped
 *                         need       "these chunks did not come, or came damaged"
 *                         delivered  "all of it is here (or its lease has counted already): stop"
 *   receiver → publisher  stored     "these chunks of your sum are verified and kept": paces the
 *   fan-out
 *                         needSum    "these chunks came damaged"
 *   any → any             wantSum    "I lack this sum of a committed step"
 *                         noSum      "I do not hold it (any more)"
 */
export type CreditMessage = CreditOf<keyof CreditFields>
export type CreditOf<Kind extends keyof CreditFields> = {
  [K in Kind]: { kind: K; from: WorkerId | string } & CreditFields[K]
}[Kind]
interface CreditFields {
  offer: { numChunks: number; bytes: number } & ContributionAddress
  grant: ContributionAddress
  need: { chunks: number[] } & ContributionAddress
  delivered: ContributionAddress
  stored: { chunks: number[] } & SumAddress
  needSum: { chunks: number[] } & SumAddress
  wantSum: { step: number; slice: number; digest: string }
  noSum: { step: number; slice: number }
}

const contributionFields = ['step', 'slice', 'sliceAttempt', 'lease', 'leaseAttempt']
const sumFields = ['step', 'slice', 'sliceAttempt']
const numberFields: Record<CreditMessage['kind'], readonly string[]> = {
  offer: [...contributionFields, 'numChunks', 'bytes'],
  grant: contributionFields,
  need: contributionFields,
  delivered: contributionFields,
  stored: sumFields,
  needSum: sumFields,
  wantSum: ['step', 'slice'],
  noSum: ['step', 'slice'],
}
const hasChunks = new Set(['need', 'stored', 'needSum'])

export const encodeCredit = (message: CreditMessage): Uint8Array =>
  new TextEncoder().encode(JSON.stringify(message))

const isCount = (value: unknown): value is number =>
  Number.isInteger(value) && (value as number) >= 0

/** null: no message of this protocol. */
export function decodeCredit(data: Uint8Array): CreditMessage | null {
  let value: Record<string, unknown>
  try {
    value = JSON.parse(new TextDecoder().decode(data)) as Record<string, unknown>
  } catch {
    return null
  }
  const kind = value?.kind as CreditMessage['kind']
  if (typeof kind !== 'string' || !Object.hasOwn(numberFields, kind)) return null
  if (typeof value.from !== 'string') return null
  if (!numberFields[kind].every((field) => isCount(value[field]))) return null
  const { chunks } = value
  if (hasChunks.has(kind) && !(Array.isArray(chunks) && chunks.every(isCount))) return null
  if (kind === 'wantSum' && typeof value.digest !== 'string') return null
  return value as unknown as CreditMessage
}

const refusal = (what: string) =>
  new TunemeshError('FRAME_INVALID', `A frame is ${what}; it is refused and asked for again.`)
