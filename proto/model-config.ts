/** The shape of a decoder, normalised from a Hugging Face config.json or from GGUF metadata. */
import { TunemeshError } from './errors.js'

type RotaryScaling =
  | { kind: 'none' }
  | { kind: 'linear'; factor: number }
  | {
      kind: 'llama3'
      factor: number
      lowFreqFactor: number
      highFreqFactor: number
      originalMaxPosition: number
    }

/** A decoder by data: one implementation covers every family. */
export interface ModelConfig {
  family: ModelFamily
  vocabSize: number
  hiddenSize: number
  intermediateSize: number
  numLayers: number
  numHeads: number
  numKvHeads: number
  headSize: number
  maxPositionEmbeddings: number
  rmsNormEpsilon: number
  rotaryTheta: number
  rotaryScaling: RotaryScaling
  /** Attention window in tokens; 0: none. */
  slidingWindow: number
  /** Biases on q, k and v (Qwen2). */
  qkvBias: boolean
  /** RMSNorm on each head of q and k (Qwen3). */
  qkNorm: boolean
  tieWordEmbeddings: boolean
}

const modelFamilies = ['llama', 'mistral', 'qwen2', 'qwen3'] as const
type ModelFamily = (typeof modelFamilies)[number]

const architectures: Record<ModelFamily, string> = {
  llama: 'LlamaForCausalLM',
  mistral: 'MistralForCausalLM',
  qwen2: 'Qwen2ForCausalLM',
  qwen3: 'Qwen3ForCausalLM',
}

/** As config.json names it. */
export const architectureOf = (family: ModelFamily): string => architectures[family]

/** What transformers assumes where config.json leaves a key out. */
const familyDefaults: Record<ModelFamily, { maxPosition: number; slidingWindow: number }> = {
  llama: { maxPosition: 2048, slidingWindow: 0 },
  mistral: { maxPosition: 131_072, slidingWindow: 4096 },
  qwen2: { maxPosition: 32_768, slidingWindow: 4096 },
  qwen3: { maxPosition: 32_768, slidingWindow: 4096 },
}

/**
 * @param place for messages: "model/config.json"
 * @throws TunemeshError MODEL_UNSUPPORTED, or MODEL_INVALID with every problem
 */
export function modelConfigFromJson(json: unknown, place: string): ModelConfig {
  if (typeof json !== 'object' || json === null || Array.isArray(json)) {
    throw new TunemeshError('MODEL_INVALID', `${place} is not a JSON object.`)
  }
  const fields = new Fields(json as Record<string, unknown>, place)
  const family = familyOf(fields)
  refuseUnsupported(fields, family)
  const hiddenSize = fields.integer('hidden_size', { most: 1 << 17 })
  const numHeads = fields.integer('num_attention_heads', { most: 4096 })
  const maxPositionEmbeddings = fields.integer('max_position_embeddings', {
    most: 1 << 24,
    fallback: familyDefaults[family].maxPosition,
  })
  const config: ModelConfig = {
    family,
    vocabSize: fields.integer('vocab_size', { most: 1 << 24 }),
    hiddenSize,
    intermediateSize: fields.integer('intermediate_size', { most: 1 << 20 }),
    numLayers: fields.integer('num_hidden_layers', { most: 1024 }),
    numHeads,
    numKvHeads: fields.integer('num_key_value_heads', {
      most: 4096,
      ...(family === 'llama' ? { fallback: numHeads } : {}),
    }),
    headSize: fields.integer('head_dim', {
      most: 1024,
      fallback: family === 'qwen3' ? 128 : hiddenSize / numHeads,
    }),
    maxPositionEmbeddings,
    rmsNormEpsilon: fields.number('rms_norm_eps', 1e-6),
    ...rotaryOf(fields),
    slidingWindow: slidingWindowOf(fields, family, maxPositionEmbeddings),
    qkvBias: family === 'qwen2',
    qkNorm: family === 'qwen3',
    tieWordEmbeddings: fields.value('tie_word_embeddings') === true,
  }
  return checked(config, fields)
}

/** Metadata keys of a GGUF file, as read by gguf-metadata.ts. */
export interface GgufModel {
  metadata: ReadonlyMap<string, unknown>
  tensors: readonly { name: string; shape: readonly number[] }[]
}

/** @throws TunemeshError MODEL_UNSUPPORTED, or MODEL_INVALID with every problem */
export function modelConfigFromGguf(gguf: GgufModel, place: string): ModelConfig {
  const architecture = String(gguf.metadata.get('general.architecture') ?? '')
  const fields = new Fields(Object.fromEntries(gguf.metadata), place)
  const family = modelFamilies.find((name) => name === architecture)
  if (!family) throw unsupported(place, `architecture "${architecture}"`, architecture)
  const key = (name: string) => `${architecture}.${name}`
  const tensor = (name: string) => gguf.tensors.find((entry) => entry.name === name)
  if (tensor('rope_freqs.weight')) {
    throw unsupported(place, 'scaled rotary frequencies (tensor rope_freqs.weight)', architecture)
  }
  const hiddenSize = fields.integer(key('embedding_length'), { most: 1 << 17 })
  const numHeads = fields.integer(key('attention.head_count'), { most: 4096 })
  const config: ModelConfig = {
    family,
    // The embedding's rows count, not the key: some files leave the key out or round it up.
    vocabSize:
      tensor('token_embd.weight')?.shape[0] ?? fields.integer(key('vocab_size'), { most: 1 << 24 }),
    hiddenSize,
    intermediateSize: fields.integer(key('feed_forward_length'), { most: 1 << 20 }),
    numLayers: fields.integer(key('block_count'), { most: 1024 }),
    numHeads,
    numKvHeads: fields.integer(key('attention.head_count_kv'), { most: 4096, fallback: numHeads }),
    headSize: fields.integer(key('attention.key_length'), {
      most: 1024,
      fallback: hiddenSize / numHeads,
    }),
    maxPositionEmbeddings: fields.integer(key('context_length'), { most: 1 << 24 }),
    rmsNormEpsilon: fields.number(key('attention.layer_norm_rms_epsilon'), 1e-6),
    rotaryTheta: fields.number(key('rope.freq_base'), 10_000),
    rotaryScaling: ggufScaling(fields, key),
    slidingWindow: fields.integer(key('attention.sliding_window'), {
      most: 1 << 24,
      least: 0,
      fallback: 0,
    }),
    qkvBias: family === 'qwen2',
    qkNorm: family === 'qwen3',
    tieWordEmbeddings: tensor('output.weight') === undefined,
  }
  const rotaryDims = fields.integer(key('rope.dimension_count'), {
    most: 1024,
    fallback: config.headSize,
  })
  fields.check(
    rotaryDims === config.headSize,
    `${key('rope.dimension_count')}: ${rotaryDims} rotates a part of each head of ` +
      `${config.headSize}, which is not supported`,
  )
  return checked(config, fields)
}

function familyOf(fields: Fields): ModelFamily {
  const type = fields.value('model_type')
  const listed = fields.value('architectures')
  const architecture = Array.isArray(listed) ? String(listed[0]) : undefined
  const family = modelFamilies.find((name) => name === type)
  if (family && (architecture === undefined || architecture === architectures[family]))
    return family
  const shown = `model_type "${String(type)}"${architecture ? ` (${architecture})` : ''}`
  throw unsupported(fields.place, shown, `${String(type)}${architecture ?? ''}`)
}

function unsupported(place: string, what: string, name: string): TunemeshError {
  const nearest = nearestFamily(name.toLowerCase())
  return new TunemeshError(
    'MODEL_UNSUPPORTED',
    `${place}: ${what} is not supported. Supported are ${modelFamilies.join(', ')}; ` +
      `the nearest is ${nearest} (${architectures[nearest]}).`,
  )
}

/** By the name's beginnings: qwen3_moe is near qwen3, mixtral near mistral, others near llama. */
function nearestFamily(name: string): ModelFamily {
  if (name.startsWith('qwen3')) return 'qwen3'
  if (name.startsWith('qwen')) return 'qwen2'
  if (name.startsWith('mi')) return 'mistral'
  return 'llama'
}

function refuseUnsupported(fields: Fields, family: ModelFamily): void {
  const activation = fields.value('hidden_act') ?? 'silu'
  const refuse = (isRefused: boolean, what: string) => {
    if (isRefused) throw unsupported(fields.place, what, family)
  }
  refuse(activation !== 'silu', `hidden_act "${String(activation)}" (only silu)`)
  // Qwen2 always has biases on q, k and v and never says so.
  refuse(family !== 'qwen2' && fields.value('attention_bias') === true, 'attention_bias true')
  refuse(fields.value('mlp_bias') === true, 'mlp_bias true')
  const quantization = fields.value('quantization_config')
  refuse(quantization !== undefined && quantization !== null, 'a model quantised already')
  const partial = fields.value('partial_rotary_factor') ?? 1
  refuse(partial !== 1, `partial_rotary_factor ${String(partial)} (only 1)`)
}

/** Both spellings: `rope_parameters`, and `rope_theta` with `rope_scaling`. */
function rotaryOf(fields: Fields): Pick<ModelConfig, 'rotaryTheta' | 'rotaryScaling'> {
  const key = isObject(fields.value('rope_parameters')) ? 'rope_parameters' : 'rope_scaling'
  const given = fields.value(key)
  const inner = new Fields(isObject(given) ? given : {}, fields.place, fields.problems, `${key}.`)
  const outerTheta = fields.number('rope_theta', 10_000)
  const rotaryTheta = inner.number('rope_theta', outerTheta)
  const kind = inner.value('rope_type') ?? inner.value('type') ?? 'default'
  if (kind === 'default') return { rotaryTheta, rotaryScaling: { kind: 'none' } }
  const factor = inner.number('factor')
  if (kind === 'linear') return { rotaryTheta, rotaryScaling: { kind: 'linear', factor } }
  if (kind !== 'llama3') {
    throw unsupported(
      fields.place,
      `${key} of type "${String(kind)}" (default, linear, llama3)`,
      '',
    )
  }
  const originalMaxPosition = inner.integer('original_max_position_embeddings', { most: 1 << 24 })
  const lowFreqFactor = inner.number('low_freq_factor')
  const highFreqFactor = inner.number('high_freq_factor')
  fields.check(
    highFreqFactor > lowFreqFactor,
    `${key}.high_freq_factor: ${highFreqFactor} is not above low_freq_factor ${lowFreqFactor}`,
  )
  return {
    rotaryTheta,
    rotaryScaling: { kind, factor, lowFreqFactor, highFreqFactor, originalMaxPosition },
  }
}

function ggufScaling(fields: Fields, key: (name: string) => string): RotaryScaling {
  const kind = fields.value(key('rope.scaling.type')) ?? 'none'
  if (kind === 'none') return { kind }
  if (kind === 'linear') return { kind, factor: fields.number(key('rope.scaling.factor')) }
  throw unsupported(fields.place, `rope.scaling.type "${String(kind)}" (none, linear)`, '')
}

/** One window for all layers, or none: what the engine computes. */
function slidingWindowOf(fields: Fields, family: ModelFamily, maxPosition: number): number {
  if (family === 'llama') return 0
  const isQwen = family !== 'mistral'
  if (isQwen && fields.value('use_sliding_window') !== true) return 0
  const given = fields.value('sliding_window')
  if (given === null) return 0
  const fallback = familyDefaults[family].slidingWindow
  const window = fields.integer('sliding_window', { most: 1 << 24, fallback })
  if (window >= maxPosition) return 0
  if (!isQwen) return window
  const numLayers = Number(fields.value('num_hidden_layers'))
  const firstWindowed = Number(fields.value('max_window_layers') ?? 28)
  const types = fields.value('layer_types')
  const numWindowed = Array.isArray(types)
    ? types.filter((type) => type === 'sliding_attention').length
    : Math.max(0, numLayers - firstWindowed)
  if (numWindowed !== 0 && numWindowed !== numLayers) {
    const what = `a sliding window in ${numWindowed} of ${numLayers} layers (all or none)`
    throw unsupported(fields.place, what, family)
  }
  return numWindowed === 0 ? 0 : window
}

function checked(config: ModelConfig, fields: Fields): ModelConfig {
  const { numHeads, numKvHeads, headSize } = config
  fields.check(
    numHeads % numKvHeads === 0,
    `num_key_value_heads: ${numKvHeads} does not divide num_attention_heads ${numHeads}`,
  )
  fields.check(
    headSize % 2 === 0,
    `head_dim: ${headSize} is odd; rotary positions need an even one`,
  )
  fields.check(
    config.rmsNormEpsilon > 0 && config.rmsNormEpsilon < 1,
    `rms_norm_eps: ${config.rmsNormEpsilon} is not between 0 and 1`,
  )
  fields.check(config.rotaryTheta > 1, `rope_theta: ${config.rotaryTheta} is not above 1`)
  const [first, ...rest] = [...new Set(fields.problems)]
  if (first === undefined) return config
  throw new TunemeshError('MODEL_INVALID', first, {
    details: rest.map((line) => `MODEL_INVALID ${line}`),
  })
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value)

/** Reads typed fields and collects every problem. A bad field reads as a harmless number. */
class Fields {
  constructor(
    private readonly json: Record<string, unknown>,
    readonly place: string,
    readonly problems: string[] = [],
    private readonly prefix = '',
  ) {}

  value(key: string): unknown {
    return Object.hasOwn(this.json, key) ? this.json[key] : undefined
  }

  check(isFine: boolean, problem: string): void {
    if (!isFine) this.problems.push(`${this.place} ${this.prefix}${problem}.`)
  }

  integer(key: string, limits: { most: number; least?: number; fallback?: number }): number {
    const { most, least = 1, fallback } = limits
    const value = this.value(key) ?? fallback
    if (Number.isSafeInteger(value) && Number(value) >= least && Number(value) <= most) {
      return Number(value)
    }
    const seen = value === undefined ? 'missing' : JSON.stringify(value)
    this.check(false, `${key}: ${seen}, expected an integer from ${least} to ${most}`)
    return 2
  }

  number(key: string, fallback?: number): number {
    const value = this.value(key) ?? fallback
    if (typeof value === 'number' && Number.isFinite(value)) return value
    const seen = value === undefined ? 'missing' : JSON.stringify(value)
    this.check(false, `${key}: ${seen}, expected a number`)
    return 1
  }
}
