/** A Llama of five million random weights, for full fine-tuning on the tiny model's tokenizer. */
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

const tinyModel = 'examples/tiny-llama'

const config = {
  hidden_size: 256,
  intermediate_size: 704,
  num_hidden_layers: 5,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 64,
  vocab_size: 4096,
}

export function writeSmallModel(folder: string): void {
  mkdirSync(folder, { recursive: true })
  for (const name of ['tokenizer.json', 'tokenizer_config.json']) {
    copyFileSync(join(tinyModel, name), join(folder, name))
  }
  const tiny = JSON.parse(readFileSync(join(tinyModel, 'config.json'), 'utf8')) as object
  writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...tiny, ...config }))
  writeFileSync(join(folder, 'model.safetensors'), randomSafetensors(tensorShapes()))
}

function tensorShapes(): Map<string, number[]> {
  const { hidden_size: hidden, intermediate_size: width, head_dim: head, vocab_size } = config
  const query = config.num_attention_heads * head
  const keys = config.num_key_value_heads * head
  const shapes = new Map<string, number[]>([['model.embed_tokens.weight', [vocab_size, hidden]]])
  for (let layer = 0; layer < config.num_hidden_layers; layer++) {
    const add = (name: string, shape: number[]) =>
      shapes.set(`model.layers.${layer}.${name}.weight`, shape)
    add('input_layernorm', [hidden])
    add('mlp.down_proj', [hidden, width])
    add('mlp.gate_proj', [width, hidden])
    add('mlp.up_proj', [width, hidden])
    add('post_attention_layernorm', [hidden])
    add('self_attn.k_proj', [keys, hidden])
    add('self_attn.o_proj', [hidden, query])
    add('self_attn.q_proj', [query, hidden])
    add('self_attn.v_proj', [keys, hidden])
  }
  return shapes.set('model.norm.weight', [hidden])
}

function randomSafetensors(shapes: Map<string, number[]>): Buffer {
  const header: Record<string, object> = {}
  const parts: Buffer[] = []
  let offset = 0
  for (const [name, shape] of shapes) {
    const numElements = shape.reduce((product, extent) => product * extent, 1)
    const values =
      shape.length === 1
        ? new Float32Array(numElements).fill(1)
        : Float32Array.from({ length: numElements }, () => (Math.random() - 0.5) * 0.07)
    const end = offset + values.byteLength
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, end] }
    parts.push(Buffer.from(values.buffer))
    offset = end
  }
  const text = JSON.stringify(header)
  const padded = text.padEnd(Math.ceil(text.length / 8) * 8)
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(BigInt(padded.length))
  return Buffer.concat([length, Buffer.from(padded), ...parts])
}
