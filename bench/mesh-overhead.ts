/**
 * `npm run bench -- mesh-overhead [--steps N] [--json]`: what the mesh costs beside the bare
 * engine, and what a second worker gains. SmolLM2-135M, LoRA r=16 on all linears, 2,048 tokens a
 * step (8 micro-batches of 256).
 *
 *   bare      this process: 8 micro-batches, rounding, sums, update; nothing else
 *   1 worker  the same steps through coordinator, leases, commit log (synchronous) and reports
 *   2 workers one thread each, gradients over nats-server
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
  options: { steps: { type: 'string', default: '8' }, json: { type: 'boolean', default: false } },
})
const steps = Number(values.steps)
const tokensPerPack = 256
const packsPerStep = 8
const modules = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']

const median = (numbers: number[]): number => {
  const sorted = [...numbers].sort((a, b) => a - b)
  return sorted[Math.floor(sorted.length / 2)] ?? Number.NaN
}

function specFor(layout: { sliceBlocks: number; chunkBlocks: number }): TrainSpec {
  return {
    finetuning: 'lora',
    lora: { loraRank: 16, alpha: 32, targetModules: modules, useRslora: false },
    precision: 'fp32',
    states: 'fp32',
    seed: 1,
    tokensPerMicroBatch: tokensPerPack,
    longestDocument: tokensPerPack,
    lossChunkRows: 128,
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
    modelPath: demoModel,
    config: modelConfigFromGguf(readGguf(demoModel), demoModel),
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
  for (let pack = 0; pack < packsPerStep; pack++) {
    await engine.microBatch(randomBatch(step * packsPerStep + pack), tokensPerPack * packsPerStep, {
      slot: 0,
    })
  }
  await exchange.contributionDigests(0)
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
    { length: tokensPerPack },
    (_, i) => 100 + ((i * 7919 + seed * 104729) % 40_000),
  )
  const targets = Int32Array.from(tokens, (_, i) => tokens[i + 1] ?? -100)
  return { tokens, targets, documentStarts: Int32Array.from([0, tokensPerPack]) }
}

/** Milliseconds between the commits of a job on `numWorkers` workers of one thread each. */
async function meshSteps(
  numWorkers: number,
): Promise<{ durations: number[]; exposedMs: number[] }> {
  const durations: number[] = []
  const exposedMs: number[] = []
  const settings = [
    `gradient_accumulation_steps: ${packsPerStep}`,
    `max_steps: ${steps}`,
    'save_steps: 0',
  ]
  const numRows = packsPerStep * 4
  await runMeshJob(
    { numWorkers, model: demoModel, numRows, tokensPerPack, settings },
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

requireDemoModel()
const before = await bareSteps()
const one = await meshSteps(1)
const two = await meshSteps(2)
const bare = median([...before.slice(1), ...(await bareSteps()).slice(1)])
const rows = [
  { work: 'bare engine loop', ms: bare, exposed_ms: 0 },
  {
    work: '1 worker',
    ms: median(one.durations.slice(1)),
    exposed_ms: median(one.exposedMs.slice(1)),
  },
  {
    work: '2 workers',
    ms: median(two.durations.slice(1)),
    exposed_ms: median(two.exposedMs.slice(1)),
  },
].map((row) => ({ ...row, tokens_per_second: (tokensPerPack * packsPerStep * 1000) / row.ms }))
if (values.json) for (const row of rows) console.log(JSON.stringify(row))
else {
  console.log('2,048 tokens a step      ms a step   exposed ms   tokens/s')
  for (const { work, ms, exposed_ms, tokens_per_second } of rows)
    console.log(
      work.padEnd(22) +
        ms.toFixed(0).padStart(12) +
        exposed_ms.toFixed(1).padStart(13) +
        tokens_per_second.toFixed(0).padStart(11),
    )
  const [alone, single, double] = rows.map(({ ms }) => ms) as [number, number, number]
  console.log(
    `one worker over the bare loop: ${((single / alone - 1) * 100).toFixed(1)} % (at most 5 %)`,
  )
  console.log(`two workers over one: × ${(single / double).toFixed(2)} (at least 1.7)`)
}
