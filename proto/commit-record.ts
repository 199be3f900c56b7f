/**
 * Records of a job's commit log: one JetStream subject, every append compare-and-set on its last
 * sequence. What stands here is true; everything else is on its way. proto/PROTOCOL.md §3.
 */
import { z } from 'zod'

const uint64Hex = z.string().regex(/^[0-9a-f]{16}$/)
const float32 = z.number().refine((value) => Math.fround(value) === value, 'not a float32')
const step = z.number().int().nonnegative()

/** Who appended it, and which of that coordinator's appends: equal ids are the same append. */
const author = {
  coordinatorId: z.string().min(1),
  appendNumber: z.number().int().positive(),
  fleetEpoch: z.number().int().positive(),
  timeMs: z.number(),
}

const epochRecord = z.object({
  kind: z.literal('epoch'),
  ...author,
  /** The last committed step; the step under way is void. */
  step,
  reason: z.enum(['coordinator', 'formation', 'join', 'drain', 'rollback']),
  workers: z.array(z.object({ workerId: z.string(), deviceClass: z.string() })),
  /** Of the numeric plan and the trained tensors; empty until the first fleet is formed. */
  planHash: z.string(),
})

const committedSlice = z.object({
  slice: z.number().int().nonnegative(),
  sliceAttempt: z.number().int().positive(),
  workerId: z.string(),
  /**
   * Linear digest of the exact integer sum, and of the rounded values that every replica applies.
   */
  sumDigest: uint64Hex,
  publishedDigest: uint64Hex,
  sumSquares: z.number(),
})

const committedLease = z.object({
  lease: z.number().int().nonnegative(),
  leaseAttempt: z.number().int().positive(),
  workerId: z.string(),
  deviceClass: z.string(),
  microBatches: z.array(z.number().int().nonnegative()),
})

const updateNumbers = z.object({
  learningRate: float32,
  clipFactor: float32,
  biasCorrection1: float32,
  biasCorrection2Sqrt: float32,
  gradNorm: z.number(),
})

const commitRecord = z.object({
  kind: z.literal('commit'),
  ...author,
  step: step.positive(),
  slices: z.array(committedSlice),
  leases: z.array(committedLease),
  update: updateNumbers,
  lossSum: z.number(),
  lossDivisor: z.number().positive(),
  numTargetTokens: z.number().int().nonnegative(),
  numTokens: z.number().int().nonnegative(),
})

/** The step counts, the weights stay: a non-finite gradient under the option `skip`. */
const skipRecord = z.object({
  kind: z.literal('skip'),
  ...author,
  step: step.positive(),
  microBatch: z.number().int(),
  tensor: z.string(),
  reason: z.string(),
})

/**
 * Appended only after the manifest is durable: before this record the checkpoint does not exist.
 */
const checkpointRecord = z.object({
  kind: z.literal('checkpoint'),
  ...author,
  step,
  manifestDigest: z.string().min(1),
  stateDigest: z.string().min(1),
  weightsSha256: z.string(),
  sizeBytes: z.number().int().nonnegative(),
})

/**
 * Steps after `toStep` are no longer true: they could not be computed again on their device
 * classes.
 */
const rollbackRecord = z.object({
  kind: z.literal('rollback'),
  ...author,
  fromStep: step,
  toStep: step,
  reason: z.string(),
})

const commitLogRecord = z.discriminatedUnion('kind', [
  epochRecord,
  commitRecord,
  skipRecord,
  checkpointRecord,
  rollbackRecord,
])

export type EpochRecord = z.infer<typeof epochRecord>
export type CommitRecord = z.infer<typeof commitRecord>
export type SkipRecord = z.infer<typeof skipRecord>
export type CheckpointRecord = z.infer<typeof checkpointRecord>
export type CommitLogRecord = z.infer<typeof commitLogRecord>

/** A record with its place in the stream. */
export interface LoggedRecord {
  sequence: number
  record: CommitLogRecord
}

export const encodeRecord = (record: CommitLogRecord): Uint8Array =>
  new TextEncoder().encode(JSON.stringify(record))

/** Throws where the bytes are no record: a log that cannot be read is never guessed at. */
export const decodeRecord = (bytes: Uint8Array): CommitLogRecord =>
  commitLogRecord.parse(JSON.parse(new TextDecoder().decode(bytes)))
