import assert from 'node:assert/strict'
import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { jsonLines, runCli } from './cli-process.js'
import { examplesDir, TestCoordinator } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'

const example = join(examplesDir, 'tiny-llama')
type Settings = Record<string, unknown>

interface Case {
  name: string
  /** Changes the model folder, a copy of the tiny one; it is the job's model then. */
  model?: (dir: string) => void
  /** Lines of rows.jsonl. */
  rows?: string[]
  settings?: Settings
  code: string
  message: RegExp
}

const row = (user: string, assistant: string) =>
  JSON.stringify({
    messages: [
      { role: 'user', content: user },
      { role: 'assistant', content: assistant },
    ],
  })
const goodRow = row('What is a wren?', 'a bird')

function changeConfig(change: Settings) {
  return (dir: string) => {
    const path = join(dir, 'config.json')
    const config = JSON.parse(readFileSync(path, 'utf8')) as Settings
    writeFileSync(path, JSON.stringify({ ...config, ...change }))
  }
}

const weightsPath = (dir: string) => join(dir, 'model.safetensors')

function changeWeights(change: (bytes: Buffer) => Buffer) {
  return (dir: string) => {
    const bytes = change(readFileSync(weightsPath(dir)))
    writeFileSync(weightsPath(dir), bytes)
  }
}

/** The header claims bytes that lie behind the end of the file. */
function lyingHeader(bytes: Buffer): Buffer {
  const headerBytes = Number(bytes.readBigUInt64LE(0))
  const header = bytes.toString('utf8', 8, 8 + headerBytes)
  const lie = header.replace(/"data_offsets":\[(\d+),(\d+)\]/, (text, from, to) => {
    return `"data_offsets":[${from},${String(Number(to) + 4).padStart(to.length, '0')}]`.slice(
      0,
      text.length,
    )
  })
  return Buffer.concat([bytes.subarray(0, 8), Buffer.from(lie), bytes.subarray(8 + headerBytes)])
}

const cases: Case[] = [
  {
    name: 'a misspelt key: the nearest one is named',
    settings: { learning_rat: 0.1 },
    code: 'JOB_INVALID',
    message: /learning_rat.*learning_rate/s,
  },
  {
    name: 'wrong types and ranges: all are told at once',
    settings: { max_steps: 'many', learning_rate: -1, gradient_accumulation_steps: 0 },
    code: 'JOB_INVALID',
    message: /max_steps[\s\S]*learning_rate|learning_rate[\s\S]*max_steps/,
  },
  {
    name: 'no such model folder',
    settings: { model: 'nowhere' },
    code: 'MODEL_NOT_FOUND',
    message: /nowhere/,
  },
  {
    name: 'a model folder without weights',
    model: (dir) => rmSync(weightsPath(dir)),
    code: 'MODEL_NOT_FOUND',
    message: /model\.safetensors/,
  },
  {
    name: 'a model folder without a tokenizer',
    model: (dir) => rmSync(join(dir, 'tokenizer.json')),
    code: 'TOKENIZER_INVALID',
    message: /tokenizer\.json/,
  },
  {
    name: 'truncated weights',
    model: changeWeights((bytes) => bytes.subarray(0, bytes.length - 100)),
    code: 'SAFETENSORS_INVALID',
    message: /model\.safetensors/,
  },
  {
    name: 'weights whose header lies',
    model: changeWeights(lyingHeader),
    code: 'SAFETENSORS_INVALID',
    message: /model\.safetensors/,
  },
  {
    name: 'weights of another shape than the config says',
    model: changeConfig({ intermediate_size: 176 }),
    code: 'SAFETENSORS_INVALID',
    message: /160.*176|176.*160/s,
  },
  {
    name: 'a vocabulary larger than the model',
    model: changeConfig({ vocab_size: 500 }),
    code: 'TOKENIZER_INVALID',
    message: /511.*500/s,
  },
  {
    name: 'an architecture that is not supported',
    model: changeConfig({ architectures: ['MambaForCausalLM'], model_type: 'mamba' }),
    code: 'MODEL_UNSUPPORTED',
    message: /mamba/i,
  },
  {
    name: 'a broken row: file and line are named',
    rows: [goodRow, '{"messages": ['],
    code: 'DATA_INVALID',
    message: /rows\.jsonl:2/,
  },
  { name: 'no rows at all', rows: [], code: 'DATA_EMPTY', message: /rows\.jsonl/ },
  {
    name: 'a row that is all prompt',
    rows: [goodRow, JSON.stringify({ messages: [{ role: 'user', content: 'What?' }] })],
    code: 'DATA_INVALID',
    message: /rows\.jsonl:2/,
  },
  {
    name: 'rows longer than max_length',
    rows: [goodRow, row('What?', 'word '.repeat(90))],
    settings: { max_length: 64 },
    code: 'DATA_INVALID',
    message: /rows\.jsonl:2[\s\S]*64/,
  },
]

describe('bad input to train', { skip: engineMissing(), timeout: 180_000 }, () => {
  const folder = temporaryFolder()
  let coordinator: TestCoordinator

  before(async () => {
    coordinator = await TestCoordinator.open({ workers: 1 })
  })
  after(async () => {
    await coordinator.close()
    coordinator.removeState()
    rmSync(folder, { recursive: true, force: true })
  })

  function prepare(number: number, it: Omit<Case, 'name' | 'code' | 'message'>) {
    const dir = join(folder, String(number))
    mkdirSync(dir)
    const modelDir = join(dir, 'model')
    if (it.model) {
      cpSync(example, modelDir, { recursive: true })
      it.model(modelDir)
    }
    writeFileSync(
      join(dir, 'rows.jsonl'),
      (it.rows ?? [goodRow]).map((line) => `${line}\n`).join(''),
    )
    const settings: Settings = {
      model: it.model ? modelDir : example,
      data: 'rows.jsonl',
      output_dir: 'output',
      max_steps: 2,
      gradient_accumulation_steps: 1,
      ...it.settings,
    }
    const lines = Object.entries(settings).map(
      ([key, value]) => `${key}: ${JSON.stringify(value)}\n`,
    )
    writeFileSync(join(dir, 'job.yaml'), lines.join(''))
    return { jobPath: join(dir, 'job.yaml'), outputDir: join(dir, 'output') }
  }

  const train = (jobPath: string) =>
    runCli(['--state-dir', coordinator.stateDir, 'train', jobPath, '--json'])

  for (const [number, it] of cases.entries()) {
    test(`${it.name} (${it.code})`, async () => {
      const { jobPath, outputDir } = prepare(number, it)
      const done = await train(jobPath)
      const lines = jsonLines(done.stdout)
      const { code, message, details } = (lines.at(-1)?.error ?? {}) as {
        code: string
        message: string
        details: string[]
      }
      assert.deepEqual([done.code, code], [2, it.code], message)
      assert.match([message, ...details].join('\n'), it.message)
      assert.doesNotMatch(done.stderr + done.stdout, /\n\s+at .*:\d+/, 'no stack trace')
      assert.equal(
        lines.some((line) => line.event === 'step'),
        false,
      )
      assert.equal(existsSync(outputDir), false)
    })
  }

  for (const policy of ['truncate', 'drop'] as const) {
    test(`rows longer than max_length, ${policy}: counted, the rest trains`, async () => {
      const rows = [goodRow, row('What?', 'word '.repeat(90))]
      const settings = { max_length: 64, on_long_row: policy }
      const { jobPath } = prepare(cases.length + (policy === 'drop' ? 1 : 0), { rows, settings })
      const done = await train(jobPath)
      assert.equal(done.code, 0, done.stderr + done.stdout)
      const told = jsonLines(done.stdout).find((line) => line.event === 'preflight')
      const { numTruncatedRows = 0, numDroppedRows = 0 } = (told?.preflight ?? {}) as Record<
        string,
        number
      >
      const wanted = policy === 'drop' ? [0, 1] : [1, 0]
      assert.deepEqual([numTruncatedRows, numDroppedRows], wanted)
    })
  }

  test('an output folder that holds something (OUTPUT_IN_USE): its files stay', async () => {
    const { jobPath, outputDir } = prepare(100, {})
    mkdirSync(outputDir)
    writeFileSync(join(outputDir, 'mine'), 'keep me')
    const done = await train(jobPath)
    assert.equal(done.code, 2)
    assert.match(done.stdout, /OUTPUT_IN_USE.*not empty/)
    assert.equal(readFileSync(join(outputDir, 'mine'), 'utf8'), 'keep me')
  })

  test('after all that the coordinator has its worker, and no job is under way', async () => {
    assert.equal((await coordinator.client.listWorkers()).length, 1)
    const states = (await coordinator.client.list()).map((job) => job.state)
    const open = states.filter((state) => state !== 'FAILED' && state !== 'SUCCEEDED')
    assert.deepEqual(open, [])
  })
})
