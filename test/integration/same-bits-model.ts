/**
 * A Llama of a million elements for the tests of whole meshes: the tiny model's tokenizer, its own
 * weights.
 */
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { llamaTensors, safetensors, type Tensor } from '../../examples/tiny-llama/llama-tensors.js'
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

function weights(): Tensor[] {
  const next = uniform(seed)
  return llamaTensors(config, (_, rows, columns) => {
    const scale = (3 / columns) ** 0.5
    return Float32Array.from({ length: rows * columns }, () => next() * scale)
  })
}

/** Between -1 and 1, the same on every machine. */
function uniform(start: number): () => number {
  let state = start
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 31 - 1
  }
}
