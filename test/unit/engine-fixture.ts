/** Golden folders, tensors and specs for the engine's tests. */
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { modelConfigFromJson } from '../../proto/model-config.js'
import type { TrainSpec } from '../../proto/train-spec.js'
import { type Engine, openEngine, type TokenBatch } from '../../worker/engine.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import { readTensors } from '../golden-run/safetensors.js'
import { projectTop } from '../project-top.js'

export const families = ['llama-tied', 'llama-scaled-rope', 'qwen2', 'qwen3', 'mistral-window']

export interface TrainingReference {
  lr: number
  weight_decay: number
  steps: { loss: number; grad_norm: number; lr: number; target_tokens: number }[]
}
export interface Expected {
  loss: number
  greedy: { prompt: number[]; continuation: number[] }
  full_training: TrainingReference
  lora_training: TrainingReference
}

export const goldenFolder = (family: string) => join(projectTop, 'test/golden', family)
export const isPresent = (family: string) => existsSync(join(goldenFolder(family), 'model'))
export const expectedOf = (family: string) =>
  JSON.parse(readFileSync(join(goldenFolder(family), 'expected.json'), 'utf8')) as Expected

/** Rows of a golden batch as documents; labels are shifted by one inside each row. */
export function goldenBatch(family: string, index: number): TokenBatch {
  const tensors = readTensors(join(goldenFolder(family), 'batches.safetensors'))
  const ids = tensors.get(`input_ids.${index}`)
  const labels = tensors.get(`labels.${index}`)
  if (!ids || !labels) throw new Error(`no batch ${index}`)
  const [numRows, rowLength] = ids.shape as [number, number]
  const tokens = Int32Array.from(ids.values as BigInt64Array, Number)
  const targets = new Int32Array(tokens.length).fill(-100)
  for (let i = 0; i < targets.length; i++) {
    if (i % rowLength < rowLength - 1) targets[i] = Number(labels.values[i + 1])
  }
  const documentStarts = Int32Array.from({ length: numRows + 1 }, (_, row) => row * rowLength)
  return { tokens, targets, documentStarts }
}

export const numTargets = (batch: TokenBatch) => batch.targets.filter((id) => id !== -100).length

export const goldenSpec: TrainSpec = {
  finetuning: 'full',
  lora: null,
  precision: 'fp32',
  states: 'fp32',
  deterministic: true,
  seed: 1,
  tokensPerMicroBatch: 48,
  longestDocument: 24,
  lossChunkRows: 16,
  gradientCheckpointing: 'auto',
  activationOffloading: 'auto',
  codec: 'q24',
  beta1: 0.9,
  beta2: 0.999,
  epsilon: 1e-8,
  weightDecay: 0.01,
  numContributionSlots: 1,
  sliceBlocks: 64,
  chunkBlocks: 32,
}

export const goldenLora: TrainSpec = {
  ...goldenSpec,
  finetuning: 'lora',
  lora: {
    loraRank: 4,
    alpha: 8,
    targetModules: ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'],
    useRslora: false,
  },
}

export type DeviceChoice = Partial<Parameters<typeof openEngine>[0]>

export async function goldenEngine(family: string, choice: DeviceChoice = {}): Promise<Engine> {
  const modelPath = join(goldenFolder(family), 'model')
  const json = JSON.parse(readFileSync(join(modelPath, 'config.json'), 'utf8')) as unknown
  const engine = openEngine({
    modelPath,
    config: modelConfigFromJson(json, modelPath),
    numThreads: 2,
    instructionPath: 'auto',
    packedCacheDir: null,
    ...choice,
  })
  await engine.load()
  return engine
}

export function relativeError(found: Float32Array, wanted: Float32Array): number {
  if (found.length !== wanted.length) return Number.POSITIVE_INFINITY
  let difference = 0
  let norm = 0
  for (const [i, value] of wanted.entries()) {
    difference += ((found[i] as number) - value) ** 2
    norm += value ** 2
  }
  return Math.sqrt(difference / (norm || 1))
}

export interface StepFigures {
  loss: number
  gradNorm: number
}

/** One optimizer step of one worker without a mesh: contributions, sum, clip at norm 1, AdamW. */
export async function localStep(
  engine: Engine,
  batches: TokenBatch[],
  { step, learningRate }: { step: number; learningRate: number },
): Promise<StepFigures> {
  const exchange = new ExchangeBuffers(engine.exchangeHandle)
  const divisor = batches.reduce((sum, batch) => sum + numTargets(batch), 0)
  await exchange.clearSlot(0)
  let lossSum = 0
  for (const batch of batches) {
    lossSum += (await engine.microBatch(batch, divisor, { slot: 0 })).lossSum
  }
  let sumSquares = 0
  for (let slice = 0; slice < exchange.numSlices; slice++) {
    await exchange.clearSum(slice)
    await exchange.addOwnContribution(0, slice)
    sumSquares += (await exchange.finishSlice(step, slice)).sumSquares
  }
  const gradNorm = Math.sqrt(sumSquares)
  await engine.applyUpdate(step, {
    learningRate,
    clipFactor: Math.min(1, 1 / (gradNorm + 1e-6)),
    biasCorrection1: 1 - 0.9 ** step,
    biasCorrection2Sqrt: Math.sqrt(1 - 0.999 ** step),
  })
  return { loss: lossSum / divisor, gradNorm }
}
