import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { TunemeshError } from '../../proto/errors.js'
import { keyPlaces, nearestName, readJobFile } from '../../proto/job-file.js'
import { jobFileDocs } from '../../proto/job-file-docs.js'
import { foreignKeys, type JobSpec, jobKeys, peakLearningRate } from '../../proto/job-spec.js'

const minimal = 'model: base\ndata: rows.jsonl\n'

function read(text: string, overrides: string[] = []): JobSpec {
  return readJobFile({ text, fileName: 'job.yaml', overrides })
}

/** Every line of the refusal, as the command line prints it. */
function refusal(text: string, overrides: string[] = []): string[] {
  try {
    read(text, overrides)
  } catch (error) {
    assert.ok(error instanceof TunemeshError, String(error))
    return [`${error.code} ${error.message}`, ...error.details]
  }
  assert.fail('the job file was accepted')
}

describe('job file', () => {
  it('fills in every default of a two-line file', () => {
    assert.deepEqual(read(minimal), {
      model: 'base',
      output_dir: 'output',
      name: '',
      data: 'rows.jsonl',
      eval_data: null,
      validation_split: 0,
      kind: 'auto',
      max_length: null,
      packing: true,
      on_long_row: 'fail',
      finetuning: 'lora',
      r: 16,
      lora_alpha: 32,
      target_modules: 'all-linear',
      use_rslora: false,
      lora_dropout: 0,
      num_train_epochs: 3,
      max_steps: -1,
      per_device_train_batch_size: 1,
      gradient_accumulation_steps: 8,
      seed: 42,
      learning_rate: null,
      lr_scheduler_type: 'linear',
      warmup_steps: 0,
      warmup_ratio: 0,
      optim: 'adamw',
      weight_decay: 0,
      adam_beta1: 0.9,
      adam_beta2: 0.999,
      adam_epsilon: 1e-8,
      max_grad_norm: 1,
      on_non_finite: 'stop',
      logging_steps: null,
      save_steps: 50,
      save_total_limit: 2,
      eval_steps: 50,
      eval_on_start: false,
      gradient_codec: 'q24',
      bf16: 'auto',
      load_in_fp8: false,
      fp32_master: false,
      deterministic: true,
      dtype: 'float32',
      gradient_checkpointing: 'auto',
      activation_offloading: 'auto',
    } satisfies JobSpec)
  })

  it('reads 1e-4 as a number, and overrides win over lines', () => {
    const spec = read(`${minimal}learning_rate: 1e-4\nr: 4\n`, [
      'r=8',
      'target_modules=[q_proj, v_proj]',
    ])
    assert.equal(spec.learning_rate, 1e-4)
    assert.equal(spec.r, 8)
    assert.deepEqual(spec.target_modules, ['q_proj', 'v_proj'])
  })

  it('takes the default learning rate from the method', () => {
    assert.equal(peakLearningRate(read(minimal)), 2e-4)
    assert.equal(peakLearningRate(read(`${minimal}finetuning: full`)), 2e-5)
    assert.equal(peakLearningRate(read(`${minimal}learning_rate: 0`)), 0)
  })

  it('reports every problem at once, each with its line and what to use', () => {
    const text = [
      'modle: base',
      'data: rows.jsonl',
      'r: 0',
      'lora_dropout: 0.1',
      'target_modules: [q, v_proj]',
      'max_steps: 0',
      'seed: "x"',
      'packing: yes',
      'on_long_row: cut',
      'lora_rank: 3',
      'zzzzz: 3',
    ].join('\n')
    assert.deepEqual(refusal(text, ['max_length=7', 'lerning_rate=1']), [
      'JOB_INVALID job.yaml:1 modle: there is no such key. Did you mean model?',
      'JOB_INVALID job.yaml:3 r: 0 is not allowed. Use integer from 1 to 1024.',
      'JOB_INVALID job.yaml:4 lora_dropout: 0.1 is not allowed: adapters are trained without ' +
        'dropout. Use 0.',
      'JOB_INVALID job.yaml:5 target_modules: ["q","v_proj"] is not allowed. ' +
        'Use all-linear or a list of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, ' +
        'down_proj.',
      'JOB_INVALID job.yaml:6 max_steps: 0 is not allowed. Use -1 or integer from 1 to 10000000.',
      'JOB_INVALID job.yaml:7 seed: "x" is not allowed. Use integer from 0 to 4294967295.',
      'JOB_INVALID job.yaml:8 packing: "yes" is not allowed. Use true or false.',
      'JOB_INVALID job.yaml:9 on_long_row: "cut" is not allowed. Use fail, truncate, drop.',
      'JOB_INVALID job.yaml:10 lora_rank: there is no such key. Did you mean r?',
      'JOB_INVALID job.yaml:11 zzzzz: there is no such key. docs/job-file.md lists the keys.',
      'JOB_INVALID --set lerning_rate: there is no such key. Did you mean learning_rate?',
      'JOB_INVALID --set max_length: 7 is not allowed. Use integer from 8 to 1048576 or null.',
    ])
  })

  it('refuses to compute layers again and to move them too', () => {
    const both = `${minimal}gradient_checkpointing: true\nactivation_offloading: true\n`
    assert.match(refusal(both).join(''), /:4 activation_offloading: true is given beside/)
    const one = read(`${minimal}gradient_checkpointing: true\nactivation_offloading: auto\n`)
    assert.deepEqual([one.gradient_checkpointing, one.activation_offloading], [true, 'auto'])
  })

  it('names what is missing', () => {
    assert.deepEqual(refusal(''), [
      'JOB_INVALID job.yaml model: required but not given. Add a line "model: path/to/model".',
      'JOB_INVALID job.yaml data: required but not given. Add a line "data: rows.jsonl".',
    ])
  })

  it('refuses settings that contradict each other', () => {
    const text = `${minimal}eval_data: more.jsonl
validation_split: 0.1
warmup_steps: 5
warmup_ratio: 0.1
max_steps: 3
lr_scheduler_type: constant
target_modules: [q_proj, q_proj]`
    assert.deepEqual(refusal(text), [
      'JOB_INVALID job.yaml:4 validation_split: 0.1 is given beside eval_data. Keep one of ' +
        'the two.',
      'JOB_INVALID job.yaml:5 warmup_steps: 5 is more than max_steps 3. Use at most 3.',
      'JOB_INVALID job.yaml:6 warmup_ratio: 0.1 is given beside warmup_steps 5. Keep one of ' +
        'the two.',
      'JOB_INVALID job.yaml:8 lr_scheduler_type: constant has no warm-up, which is also ' +
        'given. Use constant_with_warmup.',
      'JOB_INVALID job.yaml:9 target_modules: q_proj,q_proj names a module twice. Name each once.',
    ])
  })

  it('tells the line of broken YAML, of a key given twice, of a file that is no mapping', () => {
    assert.deepEqual(refusal('model: a\nmodel: b\n'), [
      'JOB_INVALID job.yaml:2 this is not valid YAML: Map keys must be unique',
    ])
    assert.match(
      refusal('model: a\ndata: [')[0] ?? '',
      /^JOB_INVALID job\.yaml:2 this is not valid YAML: /,
    )
    assert.deepEqual(refusal('- model'), [
      'JOB_INVALID job.yaml:1 a job file is a list of "key: value" lines',
    ])
    assert.deepEqual(refusal(minimal, ['r']), [
      'JOB_INVALID --set "r" is not of the form key=value',
    ])
  })

  it('takes each limit and refuses what is just beyond it', () => {
    for (const [good, bad] of [
      ['r=1024', 'r=1025'],
      ['validation_split=0.5', 'validation_split=0.51'],
      ['adam_beta2=0.9999', 'adam_beta2=1'],
      ['max_length=8', 'max_length=7'],
      ['max_steps=-1', 'max_steps=-2'],
      ['seed=4294967295', 'seed=4294967296'],
    ] as const) {
      read(minimal, [good])
      assert.equal(refusal(minimal, [bad]).length, 1, bad)
    }
  })

  it('remembers where each key stands', () => {
    const places = keyPlaces({
      text: `# first\n${minimal}`,
      fileName: 'job.yaml',
      overrides: ['r=2'],
    })
    assert.deepEqual(
      [...places],
      [
        ['model', 'job.yaml:2'],
        ['data', 'job.yaml:3'],
        ['r', '--set'],
      ],
    )
  })

  it('finds the nearest name only where one is near', () => {
    assert.equal(nearestName('packin', jobKeys), 'packing')
    assert.equal(nearestName('gradient_acumulation_step', jobKeys), 'gradient_accumulation_steps')
    assert.equal(nearestName('completely_different', jobKeys), undefined)
  })

  it('documents every key, and other names lead to keys that exist', () => {
    const docs = jobFileDocs()
    for (const key of jobKeys)
      assert.match(docs, new RegExp(`^\\| \`${key}\` \\| .+ \\| .+ \\| .+\\. \\|$`, 'm'))
    for (const [foreign, key] of Object.entries(foreignKeys)) {
      assert.ok(jobKeys.includes(key), foreign)
      assert.ok(!(jobKeys as string[]).includes(foreign), foreign)
    }
  })
})
