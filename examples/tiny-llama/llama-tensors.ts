/** Tensors of a small Llama by their Hugging Face names, and the file that holds them. */

export interface Tensor {
  name: string
  shape: number[]
  values: Float32Array
}

export interface LlamaShape {
  hidden_size: number
  intermediate_size: number
  head_dim: number
  num_attention_heads: number
  num_key_value_heads: number
  num_hidden_layers: number
  vocab_size: number
}

/** Norms are ones; `valuesOf` gives each matrix, asked in the order of the file. */
export function llamaTensors(
  config: LlamaShape,
  valuesOf: (name: string, rows: number, columns: number) => Float32Array,
): Tensor[] {
  const { hidden_size: C, intermediate_size: F, head_dim: D, vocab_size: V } = config
  const numQuery = config.num_attention_heads * D
  const numKeys = config.num_key_value_heads * D
  const matrix = (name: string, rows: number, columns: number): Tensor => ({
    name,
    shape: [rows, columns],
    values: valuesOf(name, rows, columns),
  })
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
  return [matrix('model.embed_tokens.weight', V, C), ...layers.flat(), ones('model.norm.weight')]
}

/** A safetensors file of fp32 tensors. */
export function safetensors(tensors: readonly Tensor[]): Buffer {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } }
  let offset = 0
  for (const { name, shape, values } of tensors) {
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + values.byteLength] }
    offset += values.byteLength
  }
  const text = JSON.stringify(header)
  const padded = Buffer.from(text.padEnd(Math.ceil(text.length / 8) * 8))
  const size = Buffer.alloc(8)
  size.writeBigUInt64LE(BigInt(padded.length))
  const data = tensors.map(({ values }) =>
    Buffer.from(values.buffer, values.byteOffset, values.byteLength),
  )
  return Buffer.concat([size, padded, ...data])
}
