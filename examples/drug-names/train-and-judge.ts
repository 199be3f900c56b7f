/**
 * Trains the example's job through a mesh and judges it on both question sets, before and after.
 */
import { readFileSync } from 'node:fs'
import { resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import type { Job, JobEvent, TunemeshClient } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'
import type { SplitLosses } from './demo-tables.js'

/** In the source tree: the compiled program lies in build/examples/drug-names. */
const jobFile = fileURLToPath(new URL('../../../examples/drug-names/job.yaml', import.meta.url))

export interface JudgedTraining {
  model: string
  /** Question sets to judge on: rephrased questions about seen entries, and entries never seen. */
  rows: { seenRephrased: string; neverSeen: string }
  /** Rows to train on. */
  data: string
  outputDir: string
  overrides?: string[]
  onEvent?: (event: JobEvent) => void
}

/** @throws TunemeshError the job's own error where it does not succeed */
export async function trainAndJudge(
  client: TunemeshClient,
  what: JudgedTraining,
): Promise<{ job: Job; losses: Map<string, SplitLosses> }> {
  const { seenRephrased, neverSeen } = what.rows
  const judged = { seen_rephrased: seenRephrased, never_seen: neverSeen }
  const submitted = await client.submit({
    jobFile: readFileSync(jobFile, 'utf8'),
    jobFileName: 'job.yaml',
    baseDir: resolve(jobFile, '..'),
    overrides: [
      `model=${what.model}`,
      `data=${what.data}`,
      `eval_data=${JSON.stringify(judged)}`,
      `output_dir=${what.outputDir}`,
      ...(what.overrides ?? []),
    ],
  })
  const losses = new Map<string, SplitLosses>()
  for await (const event of client.watch(submitted.jobId)) {
    what.onEvent?.(event)
    if (event.evaluation) {
      const { split, loss } = event.evaluation
      losses.set(split, { before: losses.get(split)?.before ?? loss, after: loss })
    }
  }
  const job = await client.get(submitted.jobId)
  if (job.state === 'SUCCEEDED') return { job, losses }
  const { code, message } = job.error ?? { code: '', message: '' }
  throw new TunemeshError('WORKER_FAILED', `The job ended ${job.state}: ${code} ${message}`)
}
