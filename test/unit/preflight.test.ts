import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import { prepareGoldenJob } from '../../coordinator/golden-job.js'
import { prepareJob } from '../../coordinator/ingest.js'
import type { PreparedJob, PutBlob } from '../../coordinator/prepared-job.js'
import { TunemeshError } from '../../proto/errors.js'
import { keyPlaces, readJobFile } from '../../proto/job-file.js'
import { packAt, readPackShard } from '../../proto/pack-shard.js'
import { projectTop } from '../project-top.js'

const tiny = join(projectTop, 'examples/tiny-llama')
const folder = mkdtempSync(join(tmpdir(), 'tunemesh-preflight-'))
after(() => rmSync(folder, { recursive: true, force: true }))

const blobs = new Map<string, Buffer>()
const putBlob: PutBlob = async (pieces) => {
  const bytes = Buffer.concat([...pieces])
  const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`
  blobs.set(digest, bytes)
  return { digest, sizeBytes: bytes.length }
}

interface Given {
  rows?: unknown[] | string
  evalRows?: unknown[]
  settings?: Record<string, unknown>
}

function prepare({ rows, evalRows, settings = {} }: Given): Promise<PreparedJob> {
  const lines = (values: unknown[]) => values.map((value) => `${JSON.stringify(value)}\n`).join('')
  if (rows) writeFileSync(join(folder, 'rows.jsonl'), Array.isArray(rows) ? lines(rows) : rows)
  if (evalRows) writeFileSync(join(folder, 'eval.jsonl'), lines(evalRows))
  const job = { model: tiny, data: 'rows.jsonl', ...settings }
  const file = { text: lines([job]), fileName: 'job.yaml' }
  return prepareJob({
    spec: readJobFile(file),
    keyPlaces: keyPlaces(file),
    baseDir: folder,
    jobFileName: 'job.yaml',
    putBlob,
    numThreads: 1,
  })
}

async function refusal(given: Given): Promise<string[]> {
  try {
    await prepare(given)
  } catch (error) {
    assert.ok(error instanceof TunemeshError, String(error))
    return [`${error.code} ${error.message}`, ...error.details].map((line) =>
      line.replaceAll(folder, 'FOLDER'),
    )
  }
  assert.fail('the job was accepted')
}

const text = (words: string) => ({ text: words })
const asked = (question: string, answer: string) => ({ question, answer })

describe('preflight', () => {
  it('reports counts, lengths, samples with their mask, and writes the shard', async () => {
    const rows = Array.from({ length: 5 }, (_, i) =>
      asked(`What is bird ${i}?`, `bird number ${i}`),
    )
    const job = await prepare({
      rows,
      settings: { max_length: 64, gradient_accumulation_steps: 2 },
    })
    const { samples, ...report } = job.report
    assert.deepEqual(report, {
      numRows: 5,
      numUsedRows: 5,
      numTokens: job.train.numTokens,
      numTargetTokens: job.train.numTargetTokens,
      numPacks: 3,
      numValidationRows: 0,
      numTruncatedRows: 0,
      numDroppedRows: 0,
      histogram: [{ upToTokens: 32, numRows: 5 }],
      stopTokenTrained: true,
      findings: [],
      kind: 'messages',
    })
    assert.deepEqual(samples, [
      {
        file: 'rows.jsonl',
        line: 1,
        spans: [
          {
            text: '<|im_start|>user\nWhat is bird 0?<|im_end|>\n<|im_start|>assistant\n',
            trained: false,
          },
          { text: 'bird number 0<|im_end|>', trained: true },
          { text: '\n', trained: false },
        ],
      },
      {
        file: 'rows.jsonl',
        line: 3,
        spans: [
          {
            text: '<|im_start|>user\nWhat is bird 2?<|im_end|>\n<|im_start|>assistant\n',
            trained: false,
          },
          { text: 'bird number 2<|im_end|>', trained: true },
          { text: '\n', trained: false },
        ],
      },
    ])
    const shard = readPackShard(blobs.get(job.train.shard.digest) as Buffer)
    assert.deepEqual([...job.train.tokensPerPack], [64, 64, 64])
    const counted = [0, 1, 2].map(
      (pack) => packAt(shard, pack).targets.filter((target) => target !== -100).length,
    )
    assert.deepEqual([...job.train.targetsPerPack], counted)
    assert.equal(job.schedule.numSteps, 6)
    assert.deepEqual(job.tokenizer.stopIds, [2])
  })

  it('is the same for the same seed, whatever the number of threads is', async () => {
    const prepared = await Promise.all(
      [1, 3].map((numThreads) =>
        prepareJob({
          spec: readJobFile({
            text: `model: ${tiny}\ndata: rows.jsonl\nvalidation_split: 0.2`,
            fileName: 'j',
          }),
          baseDir: tiny,
          jobFileName: 'j',
          putBlob,
          numThreads,
        }),
      ),
    )
    assert.deepEqual(prepared[0], prepared[1])
    assert.equal(prepared[0]?.report.numValidationRows, 19)
    assert.equal(prepared[0]?.report.numUsedRows, 77)
  })

  it('names every bad row by file and line, and none is left out silently', async () => {
    const lines = [
      JSON.stringify(asked('a', 'b')),
      '{"question": "a",',
      JSON.stringify({ messages: [{ role: 'user', content: 'a' }] }),
      JSON.stringify(asked('a', 'x '.repeat(40))),
    ]
    const found = await refusal({ rows: lines.join('\n'), settings: { max_length: 32 } })
    assert.match(found[0] ?? '', /^DATA_INVALID rows\.jsonl:2 is not JSON: /)
    assert.equal(
      found[1],
      'DATA_INVALID rows.jsonl:3 is all prompt: no message of role assistant says anything.',
    )
    assert.equal(
      found[2]?.replace(/\d+ tokens/, 'N tokens'),
      'DATA_INVALID rows.jsonl:4 has N tokens, more than max_length 32. ' +
        'Raise max_length, or set on_long_row to truncate or drop.',
    )
    assert.equal(found.length, 3)
  })

  it('lists at most 100 bad rows and counts the others', async () => {
    const found = await refusal({ rows: Array.from({ length: 130 }, () => ({ text: '' })) })
    assert.equal(found.length, 101)
    assert.equal(found[99], 'DATA_INVALID rows.jsonl:100 has an empty text.')
    assert.equal(found[100], 'DATA_INVALID rows.jsonl has 30 more bad rows.')
  })

  it('truncates or drops over-long rows when told to, and says how many', async () => {
    const rows = [text('one two'), text('a b '.repeat(60)), text('three')]
    const cut = await prepare({ rows, settings: { max_length: 32, on_long_row: 'truncate' } })
    assert.deepEqual([cut.report.numTruncatedRows, cut.report.numDroppedRows], [1, 0])
    assert.equal(cut.report.stopTokenTrained, false)
    assert.deepEqual(cut.report.findings, [
      'Cut to max_length 32, the end lost: 1 row.',
      'No end token is trained in 1 row (first: rows.jsonl:2): the model may not learn to stop.',
    ])
    const dropped = await prepare({ rows, settings: { max_length: 32, on_long_row: 'drop' } })
    assert.deepEqual(
      [dropped.report.numTruncatedRows, dropped.report.numDroppedRows, dropped.report.numUsedRows],
      [0, 1, 2],
    )
    assert.deepEqual(dropped.report.findings, ['Dropped, longer than max_length 32: 1 row.'])
  })

  it('refuses a row whose answer would be cut off whole', async () => {
    const rows = [asked('a b '.repeat(60), 'c')]
    assert.deepEqual(
      await refusal({ rows, settings: { max_length: 32, on_long_row: 'truncate' } }),
      [
        'DATA_INVALID rows.jsonl:1 is all prompt once it is cut to max_length 32: its answer ' +
          'starts later. ' +
          'Drop it or raise max_length.',
      ],
    )
  })

  it('refuses a dataset without rows', async () => {
    assert.deepEqual(await refusal({ rows: '\n\n' }), [
      'DATA_EMPTY rows.jsonl has no rows. Add one JSON object a line.',
    ])
    assert.deepEqual(
      await refusal({
        rows: [text('a b '.repeat(60))],
        settings: { max_length: 32, on_long_row: 'drop' },
      }),
      ['DATA_EMPTY rows.jsonl has no rows left: all 1 are longer than max_length 32.'],
    )
    assert.deepEqual(await refusal({ rows: [text('a')], settings: { data: 'none.jsonl' } }), [
      'DATA_INVALID FOLDER/none.jsonl: there is no such file.',
    ])
  })

  it('finds repeated rows, and validation rows that are also trained', async () => {
    const job = await prepare({
      rows: [text('one'), text('two'), text('one')],
      evalRows: [text('two'), text('three')],
      settings: { eval_data: 'eval.jsonl' },
    })
    assert.equal(job.report.numValidationRows, 2)
    assert.equal(job.validation?.numRows, 2)
    assert.deepEqual(job.report.findings, [
      'An earlier row is repeated in 1 row (first: rows.jsonl:3).',
      'Of 2 rows for validation 1 also stand in training.',
    ])
  })

  it('keeps several validation files apart by name', async () => {
    const rows = [text('one'), text('two')]
    const job = await prepare({
      rows,
      evalRows: [text('three'), text('four'), text('five')],
      settings: { eval_data: { easy: 'eval.jsonl', same: 'rows.jsonl' }, packing: false },
    })
    assert.deepEqual(
      job.validations.map(({ name, dataset }) => [name, dataset.numRows]),
      [
        ['easy', 3],
        ['same', 2],
      ],
    )
    assert.equal(job.validation, job.validations[0]?.dataset)
    assert.equal(job.report.numValidationRows, 5)
    assert.deepEqual(job.report.findings, ['Of 5 rows for validation 2 also stand in training.'])
  })

  it('refuses a max_length beyond the model, at its line, and takes the limit itself', async () => {
    const rows = [text('one two')]
    assert.deepEqual(await refusal({ rows, settings: { max_length: 513 } }), [
      "JOB_INVALID job.yaml:1 max_length: 513 is beyond the model's max_position_embeddings " +
        '512. Use at most 512.',
    ])
    assert.equal((await prepare({ rows, settings: { max_length: 512 } })).train.longestPack, 512)
    // The default of 1024 gives way to the model's limit.
    assert.equal((await prepare({ rows })).train.longestPack, 512)
  })

  it('names a model that is missing, is no model, or lacks files', async () => {
    const rows = [text('one two')]
    const model = join(folder, 'model')
    mkdirSync(model, { recursive: true })
    const of = (path: string) => refusal({ rows, settings: { model: path } })
    assert.deepEqual(await of('nowhere'), [
      'MODEL_NOT_FOUND model: nowhere does not exist (looked at FOLDER/nowhere). ' +
        'Give a Hugging Face folder or a .gguf file.',
    ])
    assert.deepEqual(await of('rows.jsonl'), [
      'MODEL_INVALID model: rows.jsonl is a file, but not a .gguf file. Give the folder that ' +
        'config.json lies in.',
    ])
    assert.deepEqual(await of('model'), [
      'MODEL_NOT_FOUND model: model has no config.json. Give a Hugging Face folder or a ' +
        '.gguf file.',
    ])
    cpSync(join(tiny, 'config.json'), join(model, 'config.json'))
    writeFileSync(join(model, 'pytorch_model.bin'), '')
    assert.deepEqual(await of('model'), [
      'MODEL_NOT_FOUND model: model has no model.safetensors. It has pytorch_model.bin: save ' +
        'the model as safetensors.',
    ])
    const index = join(model, 'model.safetensors.index.json')
    writeFileSync(index, JSON.stringify({ weight_map: { w: 'model-00001-of-00002.safetensors' } }))
    assert.deepEqual(await of('model'), [
      'MODEL_INVALID model: model/model.safetensors.index.json names ' +
        'model-00001-of-00002.safetensors, ' +
        'which is not there. Download it.',
    ])
    writeFileSync(join(folder, 'broken.gguf'), 'GGUF')
    assert.deepEqual(await of('broken.gguf'), [
      'GGUF_INVALID FOLDER/broken.gguf ends at byte 4 inside its header. Download the file again.',
    ])
  })

  it('refuses a tokenizer with ids beyond the vocabulary', async () => {
    const model = join(folder, 'small-vocabulary')
    cpSync(tiny, model, { recursive: true })
    writeFileSync(
      join(model, 'config.json'),
      JSON.stringify({
        model_type: 'llama',
        hidden_size: 64,
        intermediate_size: 160,
        num_attention_heads: 4,
        num_hidden_layers: 3,
        vocab_size: 511,
      }),
    )
    assert.deepEqual(await refusal({ rows: [text('one')], settings: { model } }), [
      'TOKENIZER_INVALID The tokenizer of FOLDER/small-vocabulary has ids up to 511, but the ' +
        "model's vocabulary " +
        'has 511 entries. They do not belong together.',
    ])
  })

  it("follows transformers' formulas for the learning rate", async () => {
    const rates = async (settings: Record<string, unknown>) => {
      const job = await prepare({
        rows: [text('one')],
        settings: { max_steps: 4, learning_rate: 1, ...settings },
      })
      return job.schedule.learningRates.map((rate) => Number(rate.toFixed(6)))
    }
    assert.deepEqual(await rates({ lr_scheduler_type: 'constant' }), [1, 1, 1, 1])
    assert.deepEqual(await rates({}), [1, 0.75, 0.5, 0.25])
    assert.deepEqual(await rates({ warmup_steps: 2 }), [0, 0.5, 1, 0.5])
    assert.deepEqual(await rates({ warmup_ratio: 0.26 }), [0, 0.5, 1, 0.5])
    assert.deepEqual(
      await rates({ lr_scheduler_type: 'constant_with_warmup', warmup_steps: 1 }),
      [0, 1, 1, 1],
    )
    assert.deepEqual(await rates({ lr_scheduler_type: 'cosine' }), [1, 0.853553, 0.5, 0.146447])
  })
})

describe('golden job', () => {
  it('takes tokens, labels, order and learning rates as given', async () => {
    const golden = join(projectTop, 'test/golden/llama-tied')
    const request = { folder: golden, finetuning: 'lora', maxSteps: 5 }
    const job = await prepareGoldenJob(JSON.stringify(request), putBlob)
    assert.deepEqual(job.schedule.explicitOrder, [
      ...Array.from({ length: 16 }, (_, i) => i),
      ...[0, 1, 2, 3],
    ])
    assert.deepEqual(
      [job.schedule.numSteps, job.schedule.microBatchesPerStep, job.schedule.packsPerMicroBatch],
      [5, 2, 2],
    )
    assert.equal(job.startAdapter, join(golden, 'adapter'))
    assert.deepEqual([job.spec.r, job.spec.lora_alpha], [4, 8])
    assert.deepEqual([...new Set(job.train.tokensPerPack)], [24])
    await assert.rejects(
      prepareGoldenJob(JSON.stringify({ ...request, folder }), putBlob),
      /expected\.json is missing\. Is it a golden folder\?$/,
    )
  })
})
