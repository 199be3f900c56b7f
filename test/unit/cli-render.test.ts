import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { instructionPathOf } from '../../cli/doctor-engine.js'
import { findingsOf } from '../../cli/doctor-gpus.js'
import { escapeLine, escapeText, shorten } from '../../cli/escape.js'
import {
  formatBytes,
  formatDuration,
  formatLarge,
  formatLoss,
  sparkline,
} from '../../cli/format.js'
import { overridesOf, readJobFile } from '../../cli/job-file.js'
import { loggingStepsOf } from '../../cli/logging-steps.js'
import { asTunemeshError, renderError } from '../../cli/render-error.js'
import { isStepShown, renderEvent, renderStep } from '../../cli/render-event.js'
import { renderJobs, renderSuccess } from '../../cli/render-jobs.js'
import { renderPlan, renderPreflight, renderSample } from '../../cli/render-plan.js'
import { table, uncoloured } from '../../cli/style.js'
import type { Job, JobEvent, Plan } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'
import { isNewEnough } from '../../proto/nats-search.js'

test('plan: layers that are computed again or moved are told, plain ones are not', () => {
  const kept = { everything: 0, products: 28, attentionHalves: 0, inputs: 0, offloaded: 0 }
  const linesOf = (changed: object, freeMode = false) =>
    renderPlan(
      {
        numSteps: 4,
        microBatchesPerStep: 2,
        numTrainedParameters: 1000,
        precision: 'bf16',
        freeMode,
        estimatedSeconds: 0,
        timeBasis: '',
        warnings: [],
        memory: {
          totalBytes: 2 ** 30,
          uses: [{ purpose: 'activations', sizeBytes: 2 ** 30 }],
          layers: { ...kept, embeddingOnHost: false, ...changed },
        },
      } as unknown as Plan,
      uncoloured,
    ).join('\n')
  assert.doesNotMatch(linesOf({}), /layers|host/)
  const told = linesOf({
    products: 3,
    inputs: 12,
    attentionHalves: 4,
    offloaded: 9,
    embeddingOnHost: true,
  })
  assert.match(
    told,
    /of 28 layers 12 are computed again in backward, 4 in part \(gate and up\), 9 are kept in host/,
  )
  assert.match(told, /the embedding is read from host memory/)
  assert.doesNotMatch(told, /free mode/)
  assert.match(linesOf({}, true), /in bf16, in free mode: its bits are not promised/)
})

const step = {
  step: 7,
  numSteps: 60,
  loss: 2.34567,
  gradNorm: 1.5,
  learningRate: 1.8e-4,
  numTargetTokens: 100,
  numTokens: 512,
  stepMs: 640,
  exposedMs: 20,
  tokensPerSecond: 812.4,
  dataEpoch: 0.3,
  etaMs: 83_000,
  shares: [],
  fleetEpoch: 1,
}

const job: Job = {
  jobId: 'j-1',
  state: 'SUCCEEDED',
  createdAtMs: 1,
  startedAtMs: 1_000,
  endedAtMs: 193_000,
  error: null,
  jobFile: '',
  specJson: '',
  outputDir: '/out',
  step: 60,
  numSteps: 60,
  lastLoss: 1.87,
  adapterDigest: 'sha256:aa',
  artifacts: [{ path: 'adapter_model.safetensors', digest: 'sha256:aa', sizeBytes: 9 }],
  precision: 'fp32',
  weightsSha256: 'abcd',
  name: 'drug-names',
}

test('escape: no control byte of a model or of data reaches the terminal', () => {
  const hostile = '\x1b]0;title\x07\x1b[2J\r\n\x9b31mred\u202eevil\u2066\x7f'
  assert.match(escapeLine(hostile), /^[\x20-\x7e]+$/)
  assert.equal(escapeLine('a\nb\tc'), 'a\\nb\\tc')
  assert.equal(escapeText('a\nb\tc\x1b'), 'a\nb\tc\\x1b')
  assert.equal(escapeLine('Grüße, 世界 🙂'), 'Grüße, 世界 🙂')
})

test('shorten: counts characters, not halves of them', () => {
  assert.equal(shorten('🙂🙂🙂', 3), '🙂🙂🙂')
  assert.equal(shorten('🙂🙂🙂🙂', 3), '🙂🙂…')
})

test('format: sizes, times and losses keep their columns', () => {
  assert.deepEqual([0, 1023, 1024, 98e6].map(formatBytes), [
    '0 B',
    '1023 B',
    '1.00 KiB',
    '93.5 MiB',
  ])
  assert.deepEqual([850, 12_345, 245_000, 7_980_000, -1, Number.NaN].map(formatDuration), [
    '850 ms',
    '12.3 s',
    '4m 05s',
    '2h 13m',
    '–',
    '–',
  ])
  assert.deepEqual([2.3, 0.0004, 12_340, Number.NaN].map(formatLoss), [
    '2.3000',
    '4.000e-4',
    '1.234e+4',
    'NaN',
  ])
  assert.deepEqual([999, 4_917_248, 7.24e9].map(formatLarge), ['999', '4.92 M', '7.24 B'])
  assert.equal(sparkline([0, 1, 4, 8]), '▁▂▅█')
})

test('step line: step, loss, norm, rate, speed and time left', () => {
  assert.equal(
    renderStep(step),
    'step  7/60  loss 2.3457  norm 1.5000  lr 1.80e-4  812 tok/s  1m 23s left',
  )
})

test('step lines: every one of a short job, about a hundred of a long one, always the last', () => {
  assert.equal(isStepShown(step, null), true)
  const shown = Array.from({ length: 5_000 }, (_, i) => ({ ...step, step: i + 1, numSteps: 5_000 }))
  assert.equal(shown.filter((it) => isStepShown(it, null)).length, 101)
  assert.equal(isStepShown({ ...step, step: 4_999, numSteps: 5_000 }, null), false)
})

test('step lines: with logging_steps every Nth, the first and the last', () => {
  const steps = Array.from({ length: 23 }, (_, i) => ({ ...step, step: i + 1, numSteps: 23 }))
  const shown = (job: { specJson: string }) =>
    steps.filter((it) => isStepShown(it, loggingStepsOf(job))).map((it) => it.step)
  assert.deepEqual(shown({ specJson: '{"logging_steps":10}' }), [1, 10, 20, 23])
  assert.equal(shown({ specJson: '{"logging_steps":null}' }).length, 23)
  assert.equal(shown({ specJson: '' }).length, 23)
})

test('doctor: every GPU that is seen, or why there is none', () => {
  const gpu = { device: 'cuda:0', description: 'a card', memoryBytes: 80 * 2 ** 30, notes: [] }
  const seen = (report: Omit<Parameters<typeof findingsOf>[0], 'libraries'>) =>
    findingsOf({ ...report, libraries: [] }).map((finding) => `${finding.verdict} ${finding.seen}`)
  assert.deepEqual(seen({ plugin: 'p.so', gpus: [gpu], problem: '' }), [
    'good cuda:0: a card, 80.0 GiB',
  ])
  assert.deepEqual(seen({ plugin: 'p.so', gpus: [gpu], problem: 'cuda:1 is lost' }), [
    'good cuda:0: a card, 80.0 GiB',
    'warn cuda:1 is lost',
  ])
  const slower = { ...gpu, notes: ['attention runs without cuDNN'] }
  assert.deepEqual(seen({ plugin: 'p.so', gpus: [slower], problem: '' }), [
    'good cuda:0: a card, 80.0 GiB',
    'warn cuda:0: attention runs without cuDNN',
  ])
  assert.deepEqual(seen({ plugin: 'p.so', gpus: [], problem: 'no driver' }), ['warn no driver'])
  const [none] = findingsOf({ plugin: '', gpus: [], libraries: [], problem: '' })
  assert.deepEqual([none?.verdict, none?.advice.includes('scripts/build.mjs cuda')], ['good', true])
})

test('doctor: libraries are told where there is a driver to use them', () => {
  const cublas = { name: 'cuBLASLt', isGood: true, text: '13.0.2 at /l/libcublasLt.so.13' }
  const cudnn = { name: 'cuDNN', isGood: false, text: '9.19.0 does not go with cuBLASLt' }
  const told = (driver: { name: string; isGood: boolean; text: string }) =>
    findingsOf({ plugin: 'p.so', gpus: [], libraries: [driver, cublas, cudnn], problem: 'no GPU' })
      .map(({ name, verdict }) => `${name} ${verdict}`)
      .join(', ')
  const driver = { name: 'driver', isGood: true, text: 'the driver is for CUDA 13.0' }
  assert.equal(told(driver), 'gpu warn, driver good, cuBLASLt good, cuDNN warn')
  const none = { name: 'driver', isGood: false, text: 'no NVIDIA driver is loaded' }
  assert.equal(told(none), 'gpu warn')
  const [only] = findingsOf({ plugin: 'p.so', gpus: [], libraries: [none], problem: 'no GPU' })
  assert.equal(only?.seen, none.text)
})

test('job file: a mistake is found before anything is started', (t) => {
  const dir = mkdtempSync(join(tmpdir(), 'tunemesh-job-file-'))
  t.after(() => rmSync(dir, { recursive: true }))
  const path = join(dir, 'job.yaml')
  writeFileSync(path, 'model: m\ndata: d.jsonl\nlearning_rat: 1e-4\n')
  assert.throws(() => readJobFile(path, { set: ['r=0'] }), {
    code: 'JOB_INVALID',
    message: 'job.yaml:3 learning_rat: there is no such key. Did you mean learning_rate?',
    details: ['JOB_INVALID --set r: 0 is not allowed. Use integer from 1 to 1024.'],
  })
})

test('events: hostile text in a log line stays text', () => {
  const event: JobEvent = {
    sequence: 1,
    jobId: 'j',
    timeMs: 0,
    log: { level: 'warn', message: '\x1b[31mboo', workerId: 'w\x07' },
  }
  assert.deepEqual(renderEvent(event, uncoloured), ['w\\x07: \\x1b[31mboo'])
})

test('events: a failure shows code, message and every detail', () => {
  const error = {
    code: 'DATA_INVALID',
    message: 'bad rows',
    details: ['a.jsonl:3 x', 'a.jsonl:9 y'],
  }
  const event: JobEvent = {
    sequence: 1,
    jobId: 'j',
    timeMs: 0,
    stateChanged: { state: 'FAILED', error },
  }
  assert.deepEqual(renderEvent(event, uncoloured), [
    'failed DATA_INVALID bad rows\n  a.jsonl:3 x\n  a.jsonl:9 y',
  ])
})

test('sample: what is trained is marked without colour too', () => {
  const spans = [
    { text: 'Q?\n', trained: false },
    { text: 'A<|im_end|>', trained: true },
  ]
  assert.equal(
    renderSample({ file: 'a.jsonl', line: 3, spans }, uncoloured),
    'Sample     a.jsonl:3 (⟦trained⟧)\n           Q?\\n⟦A<|im_end|>⟧',
  )
})

test('preflight: rows, tokens, share trained, dropped rows and findings are all there', () => {
  const lines = renderPreflight(
    {
      numRows: 70,
      numUsedRows: 64,
      numTokens: 1_000,
      numTargetTokens: 400,
      numPacks: 3,
      numValidationRows: 4,
      numTruncatedRows: 1,
      numDroppedRows: 2,
      histogram: [{ upToTokens: 32, numRows: 64 }],
      stopTokenTrained: false,
      samples: [],
      findings: ['only 20 steps'],
      kind: 'messages',
    },
    uncoloured,
  ).join('\n')
  for (const part of [
    'messages: 64 of 70 rows, 4 held out for validation',
    '1,000 tokens in 3 sequences, 400 trained (40 %)',
    'stop token not trained',
    '1 row truncated, 2 rows dropped',
    'rows of up to 32 tokens',
    'only 20 steps',
  ]) {
    assert.ok(lines.includes(part), `${part} in\n${lines}`)
  }
})

test('success: names the adapter, the loss before and after, and what to try next', () => {
  const lines = renderSuccess(job, { firstLoss: 3.2, numSkipped: 0 }, uncoloured)
  assert.deepEqual(lines, [
    '✓ done in 3m 12s, 60 steps  loss 3.2000 → 1.8700',
    'Adapter    /out/adapter_model.safetensors',
    'Weights    sha256 abcd',
    'Try it     tunemesh chat j-1',
  ])
})

test('success: says how many of the steps were skipped', () => {
  const [first] = renderSuccess(job, { firstLoss: 3.2, numSkipped: 2 }, uncoloured)
  assert.equal(first, '✓ done in 3m 12s, 60 steps, 2 of them skipped  loss 3.2000 → 1.8700')
})

test('jobs: an empty list says how to get one', () => {
  assert.deepEqual(renderJobs([]), ['No jobs yet. Start one: tunemesh train job.yaml'])
  assert.match(renderJobs([job])[1] ?? '', /^j-1 {2}drug-names {2}succeeded {2}60\/60 {2}1\.8700/)
})

test('table: columns line up and lines carry no blanks at their end', () => {
  assert.deepEqual(
    table([
      ['A', 'B'],
      ['long', 'x'],
      ['é', ''],
    ]),
    ['A     B', 'long  x', 'é'],
  )
})

test('errors: an unexpected one is ours, a full disk is not', () => {
  assert.equal(asTunemeshError(new TypeError('x')).code, 'INTERNAL')
  assert.equal(asTunemeshError(Object.assign(new Error('x'), { code: 'ENOSPC' })).code, 'DISK_FULL')
  const text = renderError(
    new TunemeshError('JOB_INVALID', '2 problems', { details: ['job.yaml:7 a', 'job.yaml:9 b'] }),
    uncoloured,
  )
  assert.equal(text, 'JOB_INVALID 2 problems\n  job.yaml:7 a\n  job.yaml:9 b')
})

test('job file: an override needs a key and "=", a missing file is named', () => {
  assert.deepEqual(overridesOf({ set: ['r=8', 'name=a=b'], outputDir: '/o' }), [
    'r=8',
    'name=a=b',
    'output_dir="/o"',
  ])
  assert.throws(() => overridesOf({ set: ['r'] }), { code: 'JOB_INVALID' })
  assert.throws(() => overridesOf({ set: ['=8'] }), { code: 'JOB_INVALID' })
  assert.throws(() => readJobFile('/nowhere/job.yaml', {}), /nowhere\/job\.yaml does not exist/)
})

test('doctor: a processor has a path only with all of its extensions', () => {
  const avx2 = ['avx2', 'fma', 'f16c', 'bmi2']
  const avx512 = ['avx512f', 'avx512bw', 'avx512dq', 'avx512vl']
  assert.equal(instructionPathOf(new Set([...avx2, ...avx512])), 'avx512')
  assert.equal(instructionPathOf(new Set([...avx2, ...avx512.slice(1)])), 'avx2')
  assert.equal(instructionPathOf(new Set(avx2.slice(1))), 'generic')
})

test('doctor: nats-server below 2.12 is too old', () => {
  assert.deepEqual(['2.11.9', '2.12.0', '2.9.10', '3.0.1'].map(isNewEnough), [
    false,
    true,
    false,
    true,
  ])
})
