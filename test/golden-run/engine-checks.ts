/**
 * A family's folder against the engine itself: logits, every gradient, greedy continuation; full
 * and LoRA.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { modelConfigFromJson } from '../../proto/model-config.js'
import { planSlices } from '../../proto/slices.js'
import type { Precision, TrainSpec } from '../../proto/train-spec.js'
import { type Engine, openEngine, type TokenBatch } from '../../worker/engine.js'
import { type CheckList, directionErrors, maxAbsDifference, relativeError } from './checks.js'
import { floats, integers, readTensors } from './safetensors.js'

/** What expected.json of a family's folder holds. */
export interface Expected {
  loss: number
  lora_loss: number
  target_tokens: number
  greedy: { prompt: number[]; continuation: number[] }
  full_training: ExpectedTraining
  lora_training: ExpectedTraining
}
interface ExpectedTraining {
  lr: number
  weight_decay: number
  max_grad_norm: number
  steps: { step: number; loss: number; grad_norm: number; lr: number; target_tokens: number }[]
}

const limits = {
  /** Absolute; the reference's own norms and angles run in float32. */
  logits: 1e-4,
  gradient: 2e-5,
  /** Relative: float32 sums of a few dozen target tokens. */
  loss: 1e-5,
}

/** Where numbers are rounded: logits and loss relative, and of each tensor's gradient. */
interface RoundedLimits {
  logits: number
  gradientCosine: number
  gradientNorm: number
  loss: number
}
const roundedLimits: Record<Exclude<Precision, 'fp32'>, RoundedLimits> = {
  /** Rounding of 2e-3. */
  bf16: { logits: 3e-2, gradientCosine: 1e-2, gradientNorm: 2e-2, loss: 1e-2 },
  /**
   * Rounding of 2.6e-2 at root mean square, of both operands of each product. With e4m3 emulated on
   * the host the five families reach 6e-2, 8e-3, 7e-2 and 2e-3.
   */
  fp8: { logits: 1e-1, gradientCosine: 2e-2, gradientNorm: 1e-1, loss: 1e-2 },
}

export const expectedOf = (folder: string): Expected =>
  JSON.parse(readFileSync(join(folder, 'expected.json'), 'utf8')) as Expected

type Method = 'full' | 'lora'
interface Subject {
  folder: string
  device: string
  precision: Precision
}

export async function checkEngine(subject: Subject, list: CheckList): Promise<void> {
  // An fp8 base is frozen.
  if (subject.precision !== 'fp8') await checkMethod(subject, 'full', list)
  await checkMethod(subject, 'lora', list)
}

async function checkMethod(subject: Subject, method: Method, list: CheckList): Promise<void> {
  const { folder } = subject
  const expected = expectedOf(folder)
  const reference = readTensors(join(folder, `${method}.expected.safetensors`))
  const batch = batchAt(folder, 0)
  const engine = await openAt(subject, method, batch)
  try {
    const rounded = subject.precision === 'fp32' ? null : roundedLimits[subject.precision]
    const logits = await engine.logits(batch)
    const wanted = floats(reference, 'logits')
    if (rounded) list.within(`${method} logits`, relativeError(logits, wanted), rounded.logits)
    else list.within(`${method} logits`, maxAbsDifference(logits, wanted), limits.logits)
    const { lossSum, numTargetTokens } = await engine.evaluate(batch)
    const loss = method === 'full' ? expected.loss : expected.lora_loss
    const { loss: lossLimit } = rounded ?? limits
    list.within(`${method} loss`, Math.abs(lossSum / numTargetTokens - loss) / loss, lossLimit)
    await checkGradients(engine, { batch, reference, method, rounded }, list)
    // Rounded, two tokens may be as likely as each other.
    if (method === 'full' && !rounded) await checkGreedy(engine, expected, list)
  } finally {
    await engine.close()
  }
}

async function checkGradients(
  engine: Engine,
  what: {
    batch: TokenBatch
    reference: ReturnType<typeof readTensors>
    method: string
    rounded: RoundedLimits | null
  },
  list: CheckList,
): Promise<void> {
  const divisor = what.batch.targets.reduce((sum, target) => sum + (target >= 0 ? 1 : 0), 0)
  const gradients = await engine.gradients(what.batch, divisor)
  const { rounded } = what
  const checks = rounded
    ? [
        { label: 'gradients, 1 - cosine', limit: rounded.gradientCosine, measure: cosineError },
        { label: 'gradients, norm', limit: rounded.gradientNorm, measure: normError },
      ]
    : [{ label: 'gradients', limit: limits.gradient, measure: relativeError }]
  for (const { label, limit, measure } of checks) {
    let worst = { error: 0, name: 'none' }
    for (const { name, values } of gradients) {
      const key = `grad.${name.replace(/^base_model\.model\./, '')}`
      const other = what.reference.get(key) ?? what.reference.get(`grad.${name}`)
      const error = other ? measure(values, other.values as Float32Array) : Number.NaN
      if (!(error <= worst.error)) worst = { error, name }
    }
    list.within(`${what.method} ${label}`, worst.error, limit, `worst ${worst.name}`)
  }
  const numExpected = [...what.reference.keys()].filter((key) => key.startsWith('grad.')).length
  list.equal(
    `${what.method} gradients, all there`,
    gradients.length === numExpected,
    `${gradients.length} of ${numExpected}`,
  )
}

const cosineError: typeof relativeError = (a, b) => directionErrors(a, b).cosine
const normError: typeof relativeError = (a, b) => directionErrors(a, b).norm

async function checkGreedy(engine: Engine, expected: Expected, list: CheckList): Promise<void> {
  const { prompt, continuation } = expected.greedy
  const { ids } = await engine.generate(
    {
      promptIds: Int32Array.from(prompt),
      maxNewTokens: continuation.length,
      temperature: 0,
      topP: 1,
      seed: 0n,
      stopIds: [],
    },
    () => {},
  )
  list.equal('greedy continuation', String(ids) === String(continuation), String(ids))
}

/** Batch `index` as a stream of two documents, targets shifted by one within each row. */
function batchAt(folder: string, index: number): TokenBatch {
  const tensors = readTensors(join(folder, 'batches.safetensors'))
  const ids = integers(tensors, `input_ids.${index}`).rows
  const labels = integers(tensors, `labels.${index}`).rows
  const length = ids[0]?.length ?? 0
  return {
    tokens: Int32Array.from(ids.flat()),
    targets: Int32Array.from(labels.flatMap((row) => [...row.slice(1), -100])),
    documentStarts: Int32Array.from({ length: ids.length + 1 }, (_, row) => row * length),
  }
}

async function openAt(
  { folder, device, precision }: Subject,
  method: Method,
  batch: TokenBatch,
): Promise<Engine> {
  const modelPath = join(folder, 'model')
  const config = modelConfigFromJson(
    JSON.parse(readFileSync(join(modelPath, 'config.json'), 'utf8')),
    join(modelPath, 'config.json'),
  )
  const engine = openEngine({
    modelPath,
    config,
    numThreads: 2,
    instructionPath: 'auto',
    packedCacheDir: null,
    device,
    precision,
  })
  await engine.load()
  const states = method === 'full' && precision === 'bf16' ? 'bf16' : 'fp32'
  await engine.prepare({ ...specFor(method, batch), precision, states })
  if (method === 'lora') await engine.loadAdapter(join(folder, 'adapter'))
  return engine
}

function specFor(method: Method, batch: TokenBatch): Omit<TrainSpec, 'precision' | 'states'> {
  const targetModules = [
    'q_proj',
    'k_proj',
    'v_proj',
    'o_proj',
    'gate_proj',
    'up_proj',
    'down_proj',
  ]
  const { sliceBlocks, chunkBlocks } = planSlices(8192)
  return {
    finetuning: method,
    lora: method === 'lora' ? { loraRank: 4, alpha: 8, targetModules, useRslora: false } : null,
    deterministic: true,
    seed: 0,
    tokensPerMicroBatch: batch.tokens.length,
    longestDocument: Math.max(64, batch.tokens.length),
    lossChunkRows: 7,
    gradientCheckpointing: 'auto',
    activationOffloading: 'auto',
    codec: 'q24',
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weightDecay: 0,
    numContributionSlots: 2,
    sliceBlocks,
    chunkBlocks,
  }
}
