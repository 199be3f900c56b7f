/**
 * A family's 20 training steps through the whole mesh: coordinator, workers, q24 exchange over
 * nats-server.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { Job, TunemeshClient } from '../../client/client.js'
import type { Precision } from '../../proto/train-spec.js'
import { type CheckList, norms } from './checks.js'
import { expectedOf } from './engine-checks.js'
import { readTensors, type Tensor } from './safetensors.js'

const limits = {
  /** Relative, each of the 20 steps: PyTorch in float32 with q24 reaches 1.1e-6. */
  loss: 1e-5,
  gradNorm: 1e-5,
  /** ‖Δw − Δw*‖ / ‖Δw*‖: all trained parameters together, and each tensor. */
  change: 3e-4,
  changeEach: 1e-2,
}

/**
 * Rounded: of each of the 20 steps, in bf16 with full fine-tuning's weights and moments in bf16 and
 * once more with float32 masters. AdamW makes the change of weights no measure.
 */
const roundedLimits = {
  bf16: { loss: 1e-2, gradNorm: 2e-2 },
  fp8: { loss: 1e-2, gradNorm: 1e-1 },
}

export interface GoldenJob {
  folder: string
  finetuning: 'lora' | 'full'
  model?: string
  outputDir: string
  gradientCodec?: 'q24' | 'q12' | 'q8'
  precision?: Precision
  fp32Master?: boolean
}

export interface StepFigures {
  loss: number
  gradNorm: number
}

/** Submits the test-only job form and follows it to its end. */
export async function runGoldenJob(
  client: TunemeshClient,
  golden: GoldenJob,
): Promise<{ job: Job; steps: StepFigures[] }> {
  const submitted = await client.submit({
    goldenJson: JSON.stringify(golden),
    baseDir: golden.folder,
  })
  const steps: StepFigures[] = []
  for await (const event of client.watch(submitted.jobId)) {
    if (event.step) steps.push({ loss: event.step.loss, gradNorm: event.step.gradNorm })
  }
  return { job: await client.get(submitted.jobId), steps }
}

export interface GoldenMethod {
  finetuning: 'lora' | 'full'
  /** Of full fine-tuning in bf16; by default its states are bf16, rounded stochastically. */
  fp32Master?: boolean
}

export async function checkTraining(
  client: TunemeshClient,
  what: GoldenMethod & { folder: string; numWorkers: number; precision: Precision },
  list: CheckList,
): Promise<void> {
  const { folder, finetuning, numWorkers, precision, fp32Master = false } = what
  const most = precision === 'fp32' ? limits : roundedLimits[precision]
  const method = fp32Master ? `${finetuning}, fp32 master,` : finetuning
  const label = `${method} 20 steps, ${numWorkers} worker${numWorkers > 1 ? 's' : ''}`
  const outputDir = mkdtempSync(join(tmpdir(), 'tunemesh-golden-'))
  try {
    const { job, steps } = await runGoldenJob(client, {
      folder,
      finetuning,
      precision,
      ...(fp32Master ? { fp32Master } : {}),
      outputDir: join(outputDir, 'out'),
    })
    if (job.state !== 'SUCCEEDED') {
      list.failed(label, `${job.state} ${job.error?.code ?? ''} ${job.error?.message ?? ''}`)
      return
    }
    const expected = expectedOf(folder)[`${finetuning}_training`].steps
    const worst = (pick: (step: number) => number) =>
      Math.max(...expected.map((_, index) => pick(index)))
    const relative = (got: number | undefined, want: number) =>
      got === undefined ? Number.NaN : Math.abs(got - want) / Math.abs(want)
    list.within(
      `${label}: loss`,
      worst((i) => relative(steps[i]?.loss, expected[i]?.loss ?? 0)),
      most.loss,
    )
    list.within(
      `${label}: gradient norm`,
      worst((i) => relative(steps[i]?.gradNorm, expected[i]?.grad_norm ?? 0)),
      most.gradNorm,
    )
    if (precision === 'fp32') await checkWeights(client, { ...what, job, label, outputDir }, list)
  } finally {
    rmSync(outputDir, { recursive: true, force: true })
  }
}

async function checkWeights(
  client: TunemeshClient,
  what: { folder: string; finetuning: 'lora' | 'full'; job: Job; label: string; outputDir: string },
  list: CheckList,
): Promise<void> {
  const name = what.finetuning === 'lora' ? 'adapter_model.safetensors' : 'model.safetensors'
  const artifact = what.job.artifacts.find((entry) => entry.path === name)
  if (!artifact) {
    list.failed(`${what.label}: weights`, `the job delivered no ${name}`)
    return
  }
  const path = join(what.outputDir, 'fetched.safetensors')
  await client.blobs.fetch(artifact.digest, path)
  const got = readTensors(path)
  const want = readTensors(join(what.folder, `${what.finetuning}.after20.safetensors`))
  const start = readTensors(
    what.finetuning === 'lora'
      ? join(what.folder, 'adapter', 'adapter_model.safetensors')
      : join(what.folder, 'model', 'model.safetensors'),
  )
  const { all, worst } = changeErrors({ got, want, start })
  list.within(`${what.label}: weight change`, all, limits.change)
  list.within(`${what.label}: weight change, each`, worst.error, limits.changeEach, worst.name)
}

/** Names without PEFT's prefix, so that both files speak of the same tensors. */
const bare = (name: string) => name.replace(/^base_model\.model\./, '')
const byBareName = (tensors: Map<string, Tensor>) =>
  new Map([...tensors].map(([name, tensor]) => [bare(name), tensor.values as Float32Array]))

export function changeErrors(files: {
  got: Map<string, Tensor>
  want: Map<string, Tensor>
  start: Map<string, Tensor>
}) {
  const got = byBareName(files.got)
  const start = byBareName(files.start)
  let difference = 0
  let size = 0
  let worst = { error: 0, name: '' }
  for (const [name, want] of byBareName(files.want)) {
    const from = start.get(name)
    const to = got.get(name)
    if (!from || !to) return { all: Number.NaN, worst: { error: Number.NaN, name } }
    const part = norms(minus(to, from), minus(want, from))
    difference += part.difference ** 2
    size += part.size ** 2
    const error = part.size === 0 ? part.difference : part.difference / part.size
    if (!(error <= worst.error)) worst = { error, name }
  }
  return { all: Math.sqrt(difference / size), worst }
}

const minus = (a: Float32Array, b: Float32Array): Float64Array =>
  Float64Array.from(a, (value, index) => value - (b[index] as number))
