import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { TunemeshError } from '../../proto/errors.js'
import {
  type ModelConfig,
  modelConfigFromGguf,
  modelConfigFromJson,
} from '../../proto/model-config.js'
import { projectTop } from '../project-top.js'

const llama = {
  model_type: 'llama',
  architectures: ['LlamaForCausalLM'],
  hidden_act: 'silu',
  hidden_size: 64,
  intermediate_size: 128,
  max_position_embeddings: 256,
  num_attention_heads: 4,
  num_hidden_layers: 2,
  num_key_value_heads: 2,
  rms_norm_eps: 1e-5,
  vocab_size: 512,
}

const normalised: ModelConfig = {
  family: 'llama',
  vocabSize: 512,
  hiddenSize: 64,
  intermediateSize: 128,
  numLayers: 2,
  numHeads: 4,
  numKvHeads: 2,
  headSize: 16,
  maxPositionEmbeddings: 256,
  rmsNormEpsilon: 1e-5,
  rotaryTheta: 10_000,
  rotaryScaling: { kind: 'none' },
  slidingWindow: 0,
  qkvBias: false,
  qkNorm: false,
  tieWordEmbeddings: false,
}

const read = (changes: object): ModelConfig =>
  modelConfigFromJson({ ...llama, ...changes }, 'm/config.json')

function refusal(call: () => unknown): string[] {
  try {
    call()
  } catch (error) {
    assert.ok(error instanceof TunemeshError, String(error))
    return [`${error.code} ${error.message}`, ...error.details]
  }
  assert.fail('the configuration was accepted')
}

describe('model config from config.json', () => {
  it('takes what transformers assumes for keys that are left out', () => {
    assert.deepEqual(read({}), normalised)
    const { num_key_value_heads: _, rms_norm_eps: __, ...rest } = llama
    assert.deepEqual(modelConfigFromJson(rest, 'm'), {
      ...normalised,
      numKvHeads: 4,
      rmsNormEpsilon: 1e-6,
    })
  })

  it('reads rotary settings in both spellings alike', () => {
    const scaling = {
      factor: 8,
      low_freq_factor: 1,
      high_freq_factor: 4,
      original_max_position_embeddings: 64,
    }
    const expected: ModelConfig = {
      ...normalised,
      rotaryTheta: 500_000,
      rotaryScaling: {
        kind: 'llama3',
        factor: 8,
        lowFreqFactor: 1,
        highFreqFactor: 4,
        originalMaxPosition: 64,
      },
    }
    const old = { rope_theta: 500_000, rope_scaling: { rope_type: 'llama3', ...scaling } }
    const recent = { rope_parameters: { rope_theta: 500_000, rope_type: 'llama3', ...scaling } }
    assert.deepEqual(read(old), expected)
    assert.deepEqual(read(recent), expected)
    assert.deepEqual(read({ rope_scaling: { type: 'linear', factor: 2 } }).rotaryScaling, {
      kind: 'linear',
      factor: 2,
    })
    assert.deepEqual(read({ rope_scaling: null }).rotaryScaling, { kind: 'none' })
  })

  it('reads every family of the golden folders', () => {
    const top = join(projectTop, 'test/golden')
    const families = readdirSync(top, { withFileTypes: true })
      .filter((entry) => entry.isDirectory() && entry.name !== 'tokenizers')
      .map(({ name }) => {
        const json: unknown = JSON.parse(readFileSync(join(top, name, 'model/config.json'), 'utf8'))
        const config = modelConfigFromJson(json, name)
        const { family, slidingWindow, qkvBias, qkNorm, headSize, tieWordEmbeddings } = config
        return { name, family, slidingWindow, qkvBias, qkNorm, headSize, tieWordEmbeddings }
      })
    const plain = { slidingWindow: 0, qkvBias: false, qkNorm: false, headSize: 16 }
    const wanted = [
      { name: 'llama-scaled-rope', family: 'llama', ...plain, tieWordEmbeddings: false },
      { name: 'llama-tied', family: 'llama', ...plain, tieWordEmbeddings: true },
      {
        name: 'mistral-window',
        family: 'mistral',
        ...plain,
        slidingWindow: 8,
        tieWordEmbeddings: false,
      },
      { name: 'qwen2', family: 'qwen2', ...plain, qkvBias: true, tieWordEmbeddings: true },
      {
        name: 'qwen3',
        family: 'qwen3',
        ...plain,
        headSize: 32,
        qkNorm: true,
        tieWordEmbeddings: false,
      },
    ]
    // A bundle carries one of them.
    const names = new Set(families.map(({ name }) => name))
    assert.ok(names.has('llama-tied'))
    assert.deepEqual(
      families,
      wanted.filter(({ name }) => names.has(name)),
    )
  })

  it('takes a sliding window where all layers have it, none where it is never reached', () => {
    const mistral = { model_type: 'mistral', architectures: ['MistralForCausalLM'] }
    assert.equal(read({ ...mistral, sliding_window: 8 }).slidingWindow, 8)
    assert.equal(read({ ...mistral, sliding_window: null }).slidingWindow, 0)
    assert.equal(read({ ...mistral, sliding_window: 256 }).slidingWindow, 0)
    const qwen = { model_type: 'qwen2', architectures: ['Qwen2ForCausalLM'], sliding_window: 8 }
    assert.equal(read({ ...qwen, use_sliding_window: false }).slidingWindow, 0)
    assert.equal(read({ ...qwen, use_sliding_window: true }).slidingWindow, 0)
    assert.equal(read({ ...qwen, use_sliding_window: true, max_window_layers: 0 }).slidingWindow, 8)
    assert.deepEqual(
      refusal(() => read({ ...qwen, use_sliding_window: true, max_window_layers: 1 })),
      [
        'MODEL_UNSUPPORTED m/config.json: a sliding window in 1 of 2 layers (all or none) is ' +
          'not supported. ' +
          'Supported are llama, mistral, qwen2, qwen3; the nearest is qwen2 (Qwen2ForCausalLM).',
      ],
    )
  })

  it('names the nearest family for an architecture that it does not know', () => {
    const nearest = (model_type: string, architecture: string) =>
      refusal(() => read({ model_type, architectures: [architecture] }))[0]
    assert.equal(
      nearest('mixtral', 'MixtralForCausalLM'),
      'MODEL_UNSUPPORTED m/config.json: model_type "mixtral" (MixtralForCausalLM) is not ' +
        'supported. ' +
        'Supported are llama, mistral, qwen2, qwen3; the nearest is mistral (MistralForCausalLM).',
    )
    assert.match(nearest('qwen3_moe', 'Qwen3MoeForCausalLM') ?? '', /the nearest is qwen3 /)
    assert.match(nearest('gemma3_text', 'Gemma3ForCausalLM') ?? '', /the nearest is llama /)
    assert.match(nearest('llama', 'LlamaForSequenceClassification') ?? '', /^MODEL_UNSUPPORTED /)
  })

  it('refuses what the engine does not compute, saying the value and what is supported', () => {
    const tail =
      ' is not supported. Supported are llama, mistral, qwen2, qwen3; the nearest is llama ' +
      '(LlamaForCausalLM).'
    const cases: [object, string][] = [
      [{ hidden_act: 'gelu' }, 'hidden_act "gelu" (only silu)'],
      [{ attention_bias: true }, 'attention_bias true'],
      [{ mlp_bias: true }, 'mlp_bias true'],
      [{ partial_rotary_factor: 0.5 }, 'partial_rotary_factor 0.5 (only 1)'],
      [{ quantization_config: { bits: 4 } }, 'a model quantised already'],
      [
        { rope_scaling: { rope_type: 'yarn', factor: 4 } },
        'rope_scaling of type "yarn" (default, linear, llama3)',
      ],
    ]
    for (const [changes, what] of cases) {
      assert.deepEqual(
        refusal(() => read(changes)),
        [`MODEL_UNSUPPORTED m/config.json: ${what}${tail}`],
      )
    }
  })

  it('reports every bad number at once, with its limit', () => {
    const changes = {
      hidden_size: 0,
      num_hidden_layers: 1025,
      vocab_size: '512',
      intermediate_size: null,
      head_dim: 15,
      rms_norm_eps: 1,
      num_key_value_heads: 3,
    }
    assert.deepEqual(
      refusal(() => read(changes)),
      [
        'MODEL_INVALID m/config.json hidden_size: 0, expected an integer from 1 to 131072.',
        'MODEL_INVALID m/config.json vocab_size: "512", expected an integer from 1 to 16777216.',
        'MODEL_INVALID m/config.json intermediate_size: missing, expected an integer from 1 ' +
          'to 1048576.',
        'MODEL_INVALID m/config.json num_hidden_layers: 1025, expected an integer from 1 to 1024.',
        'MODEL_INVALID m/config.json num_key_value_heads: 3 does not divide num_attention_heads 4.',
        'MODEL_INVALID m/config.json head_dim: 15 is odd; rotary positions need an even one.',
        'MODEL_INVALID m/config.json rms_norm_eps: 1 is not between 0 and 1.',
      ],
    )
    assert.equal(read({ num_hidden_layers: 1024 }).numLayers, 1024)
    assert.deepEqual(
      refusal(() => modelConfigFromJson([], 'm/config.json')),
      ['MODEL_INVALID m/config.json is not a JSON object.'],
    )
  })
})

describe('model config from GGUF metadata', () => {
  const metadata = new Map<string, unknown>([
    ['general.architecture', 'llama'],
    ['llama.block_count', 2],
    ['llama.context_length', 256],
    ['llama.embedding_length', 64],
    ['llama.feed_forward_length', 128],
    ['llama.attention.head_count', 4],
    ['llama.attention.head_count_kv', 2],
    ['llama.attention.layer_norm_rms_epsilon', 1e-5],
    ['llama.rope.dimension_count', 16],
  ])
  const embedding = { name: 'token_embd.weight', shape: [512, 64] }
  const head = { name: 'output.weight', shape: [512, 64] }
  const withKey = (key: string, value: unknown) => new Map([...metadata, [key, value]])

  it('reads the same as from config.json; a missing head is a tied one', () => {
    assert.deepEqual(modelConfigFromGguf({ metadata, tensors: [embedding, head] }, 'm'), normalised)
    assert.deepEqual(modelConfigFromGguf({ metadata, tensors: [embedding] }, 'm'), {
      ...normalised,
      tieWordEmbeddings: true,
    })
  })

  it('refuses other architectures, scaled frequencies and partly rotated heads', () => {
    const tensors = [embedding]
    const lines = (map: Map<string, unknown>, extra: typeof tensors = []) =>
      refusal(() =>
        modelConfigFromGguf({ metadata: map, tensors: [...tensors, ...extra] }, 'm.gguf'),
      )
    assert.match(
      lines(withKey('general.architecture', 'phi3'))[0] ?? '',
      /^MODEL_UNSUPPORTED m\.gguf: architecture "phi3" is not supported\./,
    )
    assert.match(
      lines(metadata, [{ name: 'rope_freqs.weight', shape: [8] }])[0] ?? '',
      /^MODEL_UNSUPPORTED m\.gguf: scaled rotary frequencies/,
    )
    assert.deepEqual(lines(withKey('llama.rope.dimension_count', 8)), [
      'MODEL_INVALID m.gguf llama.rope.dimension_count: 8 rotates a part of each head of 16, ' +
        'which is not supported.',
    ])
  })
})
