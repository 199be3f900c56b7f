/**
 * Knobs for tests: time limits, sizes, failpoints. Refused by main.ts unless --testing is given.
 */
import { z } from 'zod'
import { TunemeshError } from '../proto/errors.js'

const ms = z.int().min(10).max(3_600_000)
const blocks = z
  .int()
  .min(1)
  .max(1 << 20)

const runLimits = z
  .strictObject({
    deadAfterMs: ms,
    gatherMs: ms,
    noWorkersMs: ms,
    stallAfterMs: ms,
    giveUpAfterMs: ms,
    joinStageMs: ms,
    firstBackoffMs: ms,
    longestBackoffMs: ms,
    checkpointRetryMs: ms,
    appendRetryMs: ms,
  })
  .partial()

const tuningSchema = z.strictObject({
  heartbeatMs: ms.default(1_000),
  /** Silence after which a worker's stream is ended. */
  deadAfterMs: ms.default(5_000),
  helloTimeoutMs: ms.default(10_000),
  /** How long a job may wait for its checkpoint when the coordinator ends. */
  endGraceMs: ms.default(12_000),
  /** First wait of a local worker that crashed. */
  firstRestartMs: ms.default(200),
  /** How long a worker host's certificate counts. */
  certificateLifeMs: z
    .int()
    .min(1_000)
    .default(30 * 24 * 3_600_000),
  limits: runLimits.default({}),
  /** Blocks of 256 elements in a slice and in a frame; null: as planned from the trained vector. */
  sliceBlocks: blocks.nullable().default(null),
  chunkBlocks: blocks.nullable().default(null),
  /** Names of proto/failpoint.ts at which the coordinator kills itself. */
  failpoints: z.string().default(''),
  /** Passed on to local workers as their own --failpoints and --tuning, by their order of start. */
  workers: z
    .array(
      z.strictObject({
        failpoints: z.string().default(''),
        options: z.record(z.string(), z.unknown()).default({}),
      }),
    )
    .default([]),
})

export type Tuning = z.output<typeof tuningSchema>

export function parseTuning(text: string): Tuning {
  try {
    return tuningSchema.parse(JSON.parse(text))
  } catch (cause) {
    const reason = cause instanceof z.ZodError ? z.prettifyError(cause) : String(cause)
    throw new TunemeshError('JOB_INVALID', `--tuning is not valid: ${reason}`, { cause })
  }
}
