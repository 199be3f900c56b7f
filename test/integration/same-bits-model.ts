/**
 * A Llama of a million elements for the tests of whole meshes: the tiny model's tokenizer, its own
 * weights.
 */
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { examplesDir } from './open-coordinator.js'

const config = {
  ...(JSON.parse(readFileSync(join(examplesDir, 'tiny-llama', 'config.json'), 'utf8')) as object),
  hidden_size: 128,
  intermediate_size: 512,
  num_hidden_layers: 4,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 32,
  vocab_size: 512,
}
const seed = 7

export interface ModelOptions {
  /** Value of one weight of the first layer, to break a run with. */
  poison?: number
  /** Its embedding is infinite, in a model whose head is apart. */
  poisonedToken?: number
  /**
   * The first layer's q, k and v see 2^30 times as much and weigh it 2^-30 times: the same outputs,
   * but gradients beyond the exchange's range there, and only there.
   */
  isSteep?: boolean
}

export function writeModel(folder: string, options: ModelOptions = {}): void {
  const { poison, poisonedToken, isSteep = false } = options
  mkdirSync(folder, { recursive: true })
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) {
    copyFileSync(join(examplesDir, 'tiny-llama', name), join(folder, name))
  }
  const isTied = poisonedToken === undefined
  writeFileSync(
    join(folder, 'config.json'),
    JSON.stringify({ ...config, tie_word_embeddings: isTied }),
  )
  const tensors = weights()
  const [embedding] = tensors
  if (!isTied && embedding) {
    tensors.push({ ...embedding, name: 'lm_head.weight', values: embedding.values.slice() })
    embedding.values[poisonedToken * config.hidden_size] = Number.POSITIVE_INFINITY
  }
  const victim = tensors.find(({ name }) => name.includes('layers.0.mlp.up_proj'))
  if (poison !== undefined && victim) victim.values[5] = poison
  for (const { name, values } of isSteep ? tensors : []) {
    const isNorm = name.includes('layers.0.input_layernorm')
    if (!isNorm && !/layers\.0\.self_attn\.[qkv]_proj/.test(name)) continue
    const factor = isNorm ? 2 ** 30 : 2 ** -30
    values.forEach((value, i) => {
      values[i] = value * factor
    })
  }
  writeFileSync(join(folder, 'model.safetensors'), safetensors(tensors))
}

interface Tensor {
  name: string
  shape: number[]
  values: Float32Array
}

function weights(): Tensor[] {
  const { hidden_size: C, intermediate_size: F, head_dim: D, vocab_size: V } = config
  const numQuery = config.num_attention_heads * D
  const numKeys = config.num_key_value_heads * D
  const next = uniform(seed)
  const matrix = (name: string, rows: number, columns: number): Tensor => {
    const scale = (3 / columns) ** 0.5
    const values = Float32Array.from({ length: rows * columns }, () => next() * scale)
    return { name, shape: [rows, columns], values }
  }
  const ones = (name: string): Tensor => ({
    name,
    shape: [C],
    values: new Float32Array(C).fill(1),
  })
  const layers = Array.from({ length: config.num_hidden_layers }, (_, layer) => {
    const at = (name: string) => `model.layers.${layer}.${name}.weight`
    return [
      ones(at('input_layernorm')),
      matrix(at('mlp.down_proj'), C, F),
      matrix(at('mlp.gate_proj'), F, C),
      matrix(at('mlp.up_proj'), F, C),
      ones(at('post_attention_layernorm')),
      matrix(at('self_attn.k_proj'), numKeys, C),
      matrix(at('self_attn.o_proj'), C, numQuery),
      matrix(at('self_attn.q_proj'), numQuery, C),
      matrix(at('self_attn.v_proj'), numKeys, C),
    ]
  })
  const embedding = matrix('model.embed_tokens.weight', V, C)
  return [embedding, ...layers.flat(), ones('model.norm.weight')]
}

/** Between -1 and 1, the same on every machine. */
function uniform(start: number): () => number {
  let state = start
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 31 - 1
  }
}

function safetensors(tensors: Tensor[]): Buffer {
  const header: Record<string, unknown> = {}
  let offset = 0
  for (const { name, shape, values } of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + values.byteLength] }
    offset += values.byteLength
  }
  const text = JSON.stringify(header)
  const padded = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8))
  const size = Buffer.alloc(8)
  size.writeBigUInt64LE(BigInt(padded.length))
  return Buffer.concat([size, padded, ...tensors.map(({ values }) => Buffer.from(values.buffer))])
}
