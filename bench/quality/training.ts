/** One training through a mesh that runs already: its losses. */
import { join } from 'node:path'
import type { TunemeshClient } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'
import type { Precision, RunKey } from './comparison.js'
import type { RowSet } from './row-sets.js'

export interface Training {
  key: RunKey
  rows: RowSet
  workDir: string
}

export interface Losses {
  /** One for each step. */
  steps: number[]
  heldOutBefore: number
  heldOutAfter: number
}

/** As the job file says it. */
const precisionSettings: Record<Precision, string[]> = {
  fp32: ['bf16: false'],
  bf16: ['bf16: true'],
  fp8: ['load_in_fp8: true'],
}

/** @throws TunemeshError the job's own error where it does not succeed */
export async function train(client: TunemeshClient, training: Training): Promise<Losses> {
  const { jobId } = await client.submit({
    jobFile: jobFileOf(training),
    jobFileName: 'quality.yaml',
    baseDir: training.workDir,
  })
  const losses: Losses = { steps: [], heldOutBefore: Number.NaN, heldOutAfter: Number.NaN }
  let told: { code: string; message: string } | null = null
  for await (const { step, evaluation, stateChanged } of client.watch(jobId)) {
    if (step) losses.steps.push(step.loss)
    if (evaluation && Number.isNaN(losses.heldOutBefore)) losses.heldOutBefore = evaluation.loss
    if (evaluation) losses.heldOutAfter = evaluation.loss
    if (stateChanged?.error) told = stateChanged.error
  }
  const { state, error } = await client.get(jobId)
  if (state === 'SUCCEEDED') return losses
  const { code, message } = error ?? told ?? { code: '', message: '' }
  throw new TunemeshError('WORKER_FAILED', `the job ended ${state}: ${code} ${message}`)
}

/** LoRA, one micro-batch a step, the demo's settings otherwise. */
function jobFileOf({ key, rows, workDir }: Training): string {
  const output = join(workDir, 'output', `${key.data}-${key.precision}-${key.seed}`)
  return [
    `name: quality ${key.data} ${key.precision} ${key.seed}`,
    `model: ${JSON.stringify(key.model)}`,
    `data: ${JSON.stringify(rows.train)}`,
    `eval_data: ${JSON.stringify(rows.heldOut)}`,
    `output_dir: ${JSON.stringify(output)}`,
    `max_length: ${key.max_length}`,
    'on_long_row: drop',
    `per_device_train_batch_size: ${key.batch}`,
    'gradient_accumulation_steps: 1',
    `max_steps: ${key.steps}`,
    `learning_rate: ${key.learning_rate}`,
    'lr_scheduler_type: linear',
    `warmup_steps: ${Math.min(10, key.steps)}`,
    'eval_on_start: true',
    'eval_steps: 0',
    'save_steps: 0',
    `seed: ${key.seed}`,
    ...precisionSettings[key.precision],
  ].join('\n')
}
