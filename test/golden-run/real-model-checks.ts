/**
 * The real pretrained model on real rows: tensors, chats, ids, masks, losses, logits, greedy text,
 * 12 LoRA steps.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import type { TunemeshClient } from '../../client/client.js'
import { ChatTemplate } from '../../coordinator/chat-template.js'
import { tokenizeRow } from '../../coordinator/loss-mask.js'
import { loadTokenizer, type Tokenizer } from '../../coordinator/tokenizer.js'
import { readGguf } from '../../proto/gguf-metadata.js'
import { modelConfigFromGguf } from '../../proto/model-config.js'
import type { TrainSpec } from '../../proto/train-spec.js'
import { type Engine, openEngine, type TokenBatch } from '../../worker/engine.js'
import { type CheckList, maxAbsDifference } from './checks.js'
import { floats, readTensors } from './safetensors.js'
import { changeErrors, runGoldenJob } from './training-checks.js'

interface ExpectedReal {
  gguf: string
  gguf_sha256: string
  rows: string
  first_row: number
  tensors: Record<string, { shape: number[]; sum: number; abs_sum: number; first: number[] }>
  examples: {
    text: string
    ids: number[]
    labels: number[]
    loss_sum: number
    target_tokens: number
  }[]
  greedy: { prompt: string; continuation_ids: number[]; continuation: string }[]
  tokens?: { text: string; ids: number[] }[]
  lora_training: {
    r: number
    alpha: number
    target_modules: string[]
    steps: { loss: number; grad_norm: number }[]
  }
}

const limits = {
  /** The sums are float64 sums of float32 values in another order. */
  tensorSum: 1e-6,
  rowLoss: 1e-4,
  logits: 2e-3,
  stepLoss: 1e-3,
}

export const isRealModelFolder = (folder: string): boolean =>
  existsSync(join(folder, 'expected.json')) && !existsSync(join(folder, 'batches.safetensors'))

export async function checkRealModel(
  what: {
    folder: string
    gguf: string
    device: string
    client: (numWorkers: number) => Promise<TunemeshClient>
  },
  list: CheckList,
): Promise<void> {
  const expected = JSON.parse(
    readFileSync(join(what.folder, 'expected.json'), 'utf8'),
  ) as ExpectedReal
  const tokenizer = await loadTokenizer(what.gguf)
  await checkText({ folder: what.folder, expected, tokenizer }, list)
  await withEngine(what, { ...inferenceSpec(expected), finetuning: 'full', lora: null }, (engine) =>
    checkTensors(engine, expected, list),
  )
  await withEngine(what, inferenceSpec(expected), (engine) =>
    checkNumbers({ folder: what.folder, expected, engine, tokenizer }, list),
  )
  await checkLoraSteps({ ...what, expected }, list)
}

async function withEngine(
  { gguf, device }: { gguf: string; device: string },
  spec: TrainSpec,
  use: (engine: Engine) => Promise<void>,
): Promise<void> {
  const engine = openEngine({
    modelPath: gguf,
    config: modelConfigFromGguf(readGguf(gguf), gguf),
    numThreads: 2,
    instructionPath: 'auto',
    packedCacheDir: null,
    device,
  })
  try {
    await engine.load()
    await engine.prepare(spec)
    await use(engine)
  } finally {
    await engine.close()
  }
}

async function checkText(
  what: { folder: string; expected: ExpectedReal; tokenizer: Tokenizer },
  list: CheckList,
): Promise<void> {
  const { expected, tokenizer } = what
  const texts = expected.tokens ?? []
  const wrong: string[] = []
  for (const { text, ids } of texts)
    if (String(await tokenizer.encode(text, false)) !== String(ids)) wrong.push(text)
  list.equal(
    'token ids',
    wrong.length === 0,
    `${texts.length - wrong.length} of ${texts.length} equal ${JSON.stringify(wrong[0] ?? '')}`,
  )
  const rowsFile = resolve(what.folder, '../../data/gsm8k', expected.rows)
  if (!existsSync(rowsFile))
    return list.skipped(
      'chats and masks',
      `${expected.rows} lies outside the clone and is not there`,
    )
  const lines = readFileSync(rowsFile, 'utf8').split('\n')
  const template = ChatTemplate.of(tokenizer.files)
  let equal = 0
  for (const [index, example] of expected.examples.entries()) {
    const row = JSON.parse(lines[expected.first_row + index] ?? '') as {
      question: string
      answer: string
    }
    const messages = [
      { role: 'user', content: row.question },
      { role: 'assistant', content: row.answer },
    ]
    const { ids, labels } = await tokenizeRow(
      { kind: 'messages', messages },
      { tokenizer, template },
    )
    const isEqual =
      template?.render(messages, false) === example.text &&
      String(ids) === String(example.ids) &&
      String(labels) === String(example.labels)
    equal += isEqual ? 1 : 0
  }
  list.equal(
    'chats, ids and masks',
    equal === expected.examples.length,
    `${equal} of ${expected.examples.length} rows equal`,
  )
}

async function checkTensors(
  engine: Engine,
  expected: ExpectedReal,
  list: CheckList,
): Promise<void> {
  let worst = 0
  let exact = 0
  const names = Object.keys(expected.tensors)
  const weights = new Map((await engine.weights()).map(({ name, values }) => [name, values]))
  for (const name of names) {
    const want = expected.tensors[name]
    const got = weights.get(name)
    if (!want || !got) return list.failed('tensors', `the engine has no ${name}`)
    let sum = 0
    let absSum = 0
    for (const value of got) {
      sum += value
      absSum += Math.abs(value)
    }
    worst = Math.max(
      worst,
      Math.abs(sum - want.sum) / want.abs_sum,
      Math.abs(absSum - want.abs_sum) / want.abs_sum,
    )
    exact += want.first.every((value, index) => Math.fround(value) === got[index]) ? 1 : 0
  }
  list.within('tensors: sums', worst, limits.tensorSum, `${names.length} tensors`)
  list.equal(
    'tensors: first values',
    exact === names.length,
    `${exact} of ${names.length} equal to the bit`,
  )
}

async function checkNumbers(
  what: { folder: string; expected: ExpectedReal; engine: Engine; tokenizer: Tokenizer },
  list: CheckList,
): Promise<void> {
  const { expected, engine } = what
  let worst = 0
  for (const { ids, labels, loss_sum } of expected.examples) {
    const { lossSum } = await engine.evaluate(rowBatch(ids, labels))
    worst = Math.max(worst, Math.abs(lossSum - loss_sum) / loss_sum)
  }
  list.within('row losses', worst, limits.rowLoss, `${expected.examples.length} rows`)
  const first = expected.examples[0]
  if (!first) return
  const reference = floats(
    readTensors(join(what.folder, 'expected.safetensors')),
    'logits.first_example',
  )
  const logits = await engine.logits(rowBatch(first.ids, first.labels))
  list.within(
    'logits',
    maxAbsDifference(logits.subarray(-reference.length), reference),
    limits.logits,
  )
  for (const [index, { prompt, continuation_ids }] of expected.greedy.entries()) {
    const promptIds = Int32Array.from(await what.tokenizer.encode(prompt, false))
    const { ids } = await engine.generate(
      {
        promptIds,
        maxNewTokens: continuation_ids.length,
        temperature: 0,
        topP: 1,
        seed: 0n,
        stopIds: [],
      },
      () => {},
    )
    list.equal(
      `greedy ${index}`,
      String(ids) === String(continuation_ids),
      await what.tokenizer.decode(ids),
    )
  }
}

async function checkLoraSteps(
  what: {
    folder: string
    gguf: string
    expected: ExpectedReal
    client: (numWorkers: number) => Promise<TunemeshClient>
  },
  list: CheckList,
): Promise<void> {
  const outputDir = mkdtempSync(join(tmpdir(), 'tunemesh-golden-'))
  try {
    const client = await what.client(2)
    const { job, steps } = await runGoldenJob(client, {
      folder: what.folder,
      model: what.gguf,
      finetuning: 'lora',
      outputDir: join(outputDir, 'out'),
    })
    if (job.state !== 'SUCCEEDED')
      return list.failed('12 LoRA steps', `${job.state} ${job.error?.message ?? ''}`)
    const wanted = what.expected.lora_training.steps
    const errors = wanted.map(
      ({ loss }, index) => Math.abs((steps[index]?.loss ?? Number.NaN) - loss) / loss,
    )
    list.within('12 LoRA steps, 2 workers: loss', Math.max(...errors), limits.stepLoss)
    const artifact = job.artifacts.find(({ path }) => path === 'adapter_model.safetensors')
    const path = join(outputDir, 'adapter.safetensors')
    await client.blobs.fetch(artifact?.digest ?? '', path)
    const { all } = changeErrors({
      got: readTensors(path),
      want: readTensors(join(what.folder, 'lora.after12.safetensors')),
      start: readTensors(join(what.folder, 'adapter', 'adapter_model.safetensors')),
    })
    list.within('12 LoRA steps, 2 workers: weight change', all, 1e-2)
  } finally {
    rmSync(outputDir, { recursive: true, force: true })
  }
}

function rowBatch(ids: number[], labels: number[]): TokenBatch {
  return {
    tokens: Int32Array.from(ids),
    targets: Int32Array.from([...labels.slice(1), -100]),
    documentStarts: Int32Array.from([0, ids.length]),
  }
}

const inferenceSpec = (expected: ExpectedReal): TrainSpec => ({
  finetuning: 'lora',
  lora: {
    loraRank: expected.lora_training.r,
    alpha: expected.lora_training.alpha,
    targetModules: expected.lora_training.target_modules,
    useRslora: false,
  },
  precision: 'fp32',
  states: 'fp32',
  deterministic: true,
  seed: 0,
  tokensPerMicroBatch: 512,
  longestDocument: 512,
  lossChunkRows: 64,
  gradientCheckpointing: 'auto',
  activationOffloading: 'auto',
  codec: 'q24',
  beta1: 0.9,
  beta2: 0.999,
  epsilon: 1e-8,
  weightDecay: 0,
  numContributionSlots: 1,
  sliceBlocks: 256,
  chunkBlocks: 128,
})
