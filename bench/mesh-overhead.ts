/**
 * `npm run bench -- mesh-overhead [--json]`; in the bundle `./tunemesh dev bench mesh-overhead`:
 * what the mesh costs beside the bare engine, and what a second worker gains. SmolLM2-135M, LoRA
 * r=16 on all linears, by default 2,048 tokens a step (8 micro-batches of 256).
 *
 *   bare      this process: micro-batches, rounding, sums, update; nothing else
 *   1 worker  the same steps through coordinator, leases, commit log (synchronous) and reports
 *   2 workers gradients over nats-server
 *
 *   --device cpu|cuda:0    --precision fp32|bf16      --model FILE.gguf
 *   --steps N (8)          --micro-batches N (8) a step
 *   --packs N (1) of a micro-batch, --pack-tokens N (256) each
 *   --workers N (2)        1: no second worker, which on the same card gains nothing
 *
 * Every worker has one thread. Medians of whole steps; the bare loop runs before and after the
 * mesh, on one machine.
 */
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { readGguf } from '../proto/gguf-metadata.js'
import { modelConfigFromGguf } from '../proto/model-config.js'
import { planSlices } from '../proto/slices.js'
import type { TrainSpec } from '../proto/train-spec.js'
import { openEngine, type TokenBatch } from '../worker/engine.js'
import { ExchangeBuffers } from '../worker/exchange-buffers.js'
import { cacheDir, demoModel, requireDemoModel, runMeshJob } from './mesh/mesh-job.js'

const { values } = parseArgs({
  options: {
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'fp32' },
    model: { type: 'string', default: demoModel },
    steps: { type: 'string', default: '8' },
    'micro-batches': { type: 'string', default: '8' },
    packs: { type: 'string', default: '1' },
    'pack-tokens': { type: 'string', default: '256' },
    workers: { type: 'string', default: '2' },
    json: { type: 'boolean', default: false },
  },
})

function countOf(name: 'steps' | 'micro-batches' | 'packs' | 'pack-tokens' | 'workers'): number {
  const count = Number(values[name])
  if (Number.isInteger(count) && count >= 1) return count
  console.error(`--${name} is ${values[name]}; use a whole number from 1 on.`)
  process.exit(2)
}

const steps = countOf('steps')
const tokensPerPack = countOf('pack-tokens')
const packsPerMicroBatch = countOf('packs')
const microBatches = countOf('micro-batches')
const tokensPerMicroBatch = tokensPerPack * packsPerMicroBatch
const tokensPerStep = tokensPerMicroBatch * microBatches
const isHalf = values.precision === 'bf16'
const modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

const median = (numbers: number[]): number => {
  const sorted = [...numbers].sort((a, b) => a - b)
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN
}

function specFor(layout: { sliceBlocks: number; chunkBlocks: number }): TrainSpec {
  return {
    finetuning: 'lora',
    lora: { loraRank: 16, alpha: 32, targetModules: modules, useRslora: false },
    precision: isHalf ? 'bf16' : 'fp32',
    states: 'fp32',
    deterministic: true,
    seed: 1,
    tokensPerMicroBatch,
    longestDocument: tokensPerPack,
    lossChunkRows: values.device === 'cpu' ? 128 : 0,
    gradientCheckpointing: 'auto',
    activationOffloading: 'auto',
    codec: 'q24',
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
    weightDecay: 0,
    numContributionSlots: 4,
    ...layout,
  }
}

/** Milliseconds of each step of the bare engine loop. */
async function bareSteps(): Promise<number[]> {
  const engine = openEngine({
    modelPath: values.model,
    config: modelConfigFromGguf(readGguf(values.model), values.model),
    device: values.device,
    precision: isHalf ? 'bf16' : 'fp32',
    numThreads: 1,
    instructionPath: 'auto',
    packedCacheDir: join(cacheDir, 'packed'),
  })
  try {
    const { numBlocks } = engine.plan(specFor({ sliceBlocks: 1, chunkBlocks: 1 }))
    await engine.load()
    await engine.prepare(specFor(planSlices(numBlocks)))
    const exchange = new ExchangeBuffers(engine.exchangeHandle)
    const durations: number[] = []
    for (let step = 1; step <= steps; step++) {
      const startMs = performance.now()
      await bareStep(engine, exchange, step)
      durations.push(performance.now() - startMs)
    }
    return durations
  } finally {
    await engine.close()
  }
}

async function bareStep(
  engine: ReturnType<typeof openEngine>,
  exchange: ExchangeBuffers,
  step: number,
): Promise<void> {
  await exchange.clearSlot(0)
  for (let index = 0; index < microBatches; index++) {
    // As a worker does: each slice is measured on the way, in the last one.
    const onSlice = index === microBatches - 1 ? { onSlice: () => {} } : {}
    const batch = randomBatch(step * microBatches + index)
    await engine.microBatch(batch, tokensPerStep, { slot: 0, ...onSlice })
  }
  for (let slice = 0; slice < exchange.numSlices; slice++) {
    await exchange.clearSum(slice)
    await exchange.addOwnContribution(0, slice)
    await exchange.finishSlice(step, slice)
  }
  await engine.applyUpdate(step, {
    learningRate: Math.fround(1e-4),
    clipFactor: 1,
    biasCorrection1: Math.fround(1 - 0.9 ** step),
    biasCorrection2Sqrt: Math.fround(Math.sqrt(1 - 0.999 ** step)),
  })
}

/** Every position is trained, as in the rows of kind `text` that the mesh gets. */
function randomBatch(seed: number): TokenBatch {
  const tokens = Int32Array.from(
    { length: tokensPerMicroBatch },
    (_, i) => 100 + ((i * 7919 + seed * 104729) % 40_000),
  )
  const isLast = (i: number) => i % tokensPerPack === tokensPerPack - 1
  const targets = Int32Array.from(tokens, (_, i) => (isLast(i) ? -100 : (tokens[i + 1] ?? -100)))
  const starts = Array.from({ length: packsPerMicroBatch + 1 }, (_, i) => i * tokensPerPack)
  return { tokens, targets, documentStarts: Int32Array.from(starts) }
}

/** Milliseconds between the commits of a job on `numWorkers` workers of one thread each. */
async function meshSteps(
  numWorkers: number,
): Promise<{ durations: number[]; exposedMs: number[] }> {
  const durations: number[] = []
  const exposedMs: number[] = []
  const settings = [
    `per_device_train_batch_size: ${packsPerMicroBatch}`,
    `gradient_accumulation_steps: ${microBatches}`,
    `max_steps: ${steps}`,
    'save_steps: 0',
    `bf16: ${isHalf}`,
  ]
  const numRows = packsPerMicroBatch * microBatches * 4
  const { model, device } = values
  await runMeshJob(
    { numWorkers, model, numRows, tokensPerPack, device, settings },
    {
      event: ({ step }) => {
        if (!step) return
        durations.push(step.stepMs)
        exposedMs.push(step.exposedMs)
      },
    },
  )
  return { durations, exposedMs }
}

if (values.model === demoModel) requireDemoModel()
const before = await bareSteps()
const one = await meshSteps(1)
const two = countOf('workers') > 1 ? await meshSteps(2) : null
const bare = median([...before.slice(1), ...(await bareSteps()).slice(1)])
const rowOf = (work: string, mesh: { durations: number[]; exposedMs: number[] }) => ({
  work,
  ms: median(mesh.durations.slice(1)),
  exposed_ms: median(mesh.exposedMs.slice(1)),
})
const rows = [
  { work: 'bare engine loop', ms: bare, exposed_ms: 0 },
  rowOf('1 worker', one),
  ...(two === null ? [] : [rowOf('2 workers', two)]),
].map((row) => ({ ...row, tokens_per_second: (tokensPerStep * 1000) / row.ms }))
if (values.json) for (const row of rows) console.log(JSON.stringify(row))
else {
  const title = `${tokensPerStep.toLocaleString('en')} tokens a step`
  console.log(`${title.padEnd(25)}ms a step   exposed ms   tokens/s`)
  for (const { work, ms, exposed_ms, tokens_per_second } of rows)
    console.log(
      work.padEnd(22) +
        ms.toFixed(ms < 1000 ? 1 : 0).padStart(12) +
        exposed_ms.toFixed(1).padStart(13) +
        tokens_per_second.toFixed(0).padStart(11),
    )
  const [alone, single, double] = rows.map(({ ms }) => ms) as [number, number, number?]
  const limit = values.device === 'cpu' ? 'at most 5 %' : 'at most 1 % of steps of 200 ms and more'
  console.log(
    `one worker over the bare loop: ${((single / alone - 1) * 100).toFixed(1)} % (${limit})`,
  )
  if (double !== undefined)
    console.log(`two workers over one: × ${(single / double).toFixed(2)} (at least 1.7)`)
}
