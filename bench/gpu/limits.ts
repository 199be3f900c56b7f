/**
 * The speed limit of one training step on one card: every matrix product at the card's sustained
 * rate, attention at cuDNN's measured rates, each byte that must pass between them once at the
 * measured copy rate; nothing overlapped, nothing recomputed.
 */

/** Sustained rates of one card, as bench/peers/ceilings.py prints them. */
export interface Ceilings {
  device: string
  /** FLOP/s of a large product; fp8 row-scaled, where the card has it. */
  bf16: number
  fp8?: number
  /** Bytes a second, read and written. */
  copy: number
  /** By "head size,length": forward and backward FLOP/s. */
  attention: Record<string, [number, number]>
}

interface ModelShape {
  hidden: number
  feedForward: number
  heads: number
  kvHeads: number
  headSize: number
  layers: number
  vocabulary: number
  isTied: boolean
}

const shape = (
  [hidden, feedForward, heads, kvHeads]: [number, number, number, number],
  [headSize, layers, vocabulary]: [number, number, number],
  isTied: boolean,
): ModelShape => ({ hidden, feedForward, heads, kvHeads, headSize, layers, vocabulary, isTied })

/** The same as bench/native/bench_model.h. */
export const modelShapes: Record<string, ModelShape> = {
  'llama-8b': shape([4096, 14336, 32, 8], [128, 32, 128256], false),
  'llama-3b': shape([3072, 8192, 24, 8], [128, 28, 128256], true),
  'llama-1b': shape([2048, 8192, 32, 8], [64, 16, 128256], true),
  'qwen2.5-7b': shape([3584, 18944, 28, 4], [128, 28, 152064], false),
  'smollm2-135m': shape([576, 1536, 9, 3], [64, 30, 49152], true),
  'tiny-5m': shape([256, 704, 4, 2], [64, 5, 4096], true),
}

export interface Work {
  model: string
  method: 'lora' | 'full'
  batch: number
  seq: number
  /** Of LoRA with an fp8 base: its linears at the fp8 rate, the head in bf16. */
  precision?: string
  /** Micro-batches of a step; its update is shared among them. By default 1. */
  accumulation?: number
}

interface Limit {
  tokensPerSecond: number
  /** Milliseconds of a step. */
  parts: { products: number; attention: number; moved: number; update: number }
}

/** Of a trained parameter: gradient for the norm and the update, weight, two bf16 moments. */
const updateBytes = 16

export function limitOf(card: Ceilings, work: Work): Limit {
  const model = modelShapes[work.model]
  if (model === undefined) throw new RangeError(`no model shape named ${work.model}`)
  const { hidden, feedForward, layers } = model
  const query = model.heads * model.headSize
  const keys = model.kvHeads * model.headSize
  const tokens = work.batch * work.seq
  const isFull = work.method === 'full'
  const linears = layers * (hidden * (query + 2 * keys) + query * hidden + 3 * hidden * feedForward)
  const head = hidden * model.vocabulary
  // Forward and input gradients; weight gradients where they are trained.
  const linearRate = work.precision === 'fp8' && !isFull ? card.fp8 : card.bf16
  if (linearRate === undefined) throw new RangeError(`no fp8 rate of ${card.device} is known`)
  const products = 2 * tokens * (linears / linearRate + head / card.bf16) * (isFull ? 3 : 2)

  const forward = 2 * tokens * work.seq * query * layers // half of all pairs: causal
  const [forwardRate, backwardRate] = attentionRates(card, model.headSize, work.seq)
  const attention = forward / forwardRate + (2.5 * forward) / backwardRate

  // Norms with the residual, RoPE, SwiGLU, forward and backward; the adapters' gradients read
  // inputs and output gradients.
  let elements = 16 * hidden + 4 * (query + keys) + 8 * feedForward
  if (!isFull) elements += 4 * hidden + 2 * query + 2 * keys + 3 * feedForward
  const moved = (2 * tokens * (layers * elements + 3 * model.vocabulary)) / card.copy

  const trained = linears + head * (model.isTied ? 1 : 2)
  const update = isFull ? (updateBytes * trained) / card.copy / (work.accumulation ?? 1) : 0
  return {
    tokensPerSecond: tokens / (products + attention + moved + update),
    parts: {
      products: products * 1e3,
      attention: attention * 1e3,
      moved: moved * 1e3,
      update: update * 1e3,
    },
  }
}

/** Between the measured lengths of the nearest head size, in the logarithm of the length. */
function attentionRates(card: Ceilings, headSize: number, length: number): [number, number] {
  const points = Object.entries(card.attention).map(([key, rates]) => {
    const [size = 0, at = 0] = key.split(',').map(Number)
    return { size, length: at, rates }
  })
  const distance = (size: number) => Math.abs(size - headSize)
  const nearest = Math.min(...points.map(({ size }) => distance(size)))
  const near = points
    .filter(({ size }) => distance(size) === nearest)
    .sort((a, b) => a.length - b.length)
  const last = near.at(-1)
  if (last === undefined) throw new RangeError('no attention rate was measured')
  for (let i = 0; i + 1 < near.length; i += 1) {
    const [low, high] = [near[i], near[i + 1]]
    if (low === undefined || high === undefined || length > high.length) continue
    const part = Math.max(0, Math.log(length / low.length) / Math.log(high.length / low.length))
    return [0, 1].map(
      (k) => (low.rates[k] ?? 0) + ((high.rates[k] ?? 0) - (low.rates[k] ?? 0)) * part,
    ) as [number, number]
  }
  return last.rates
}
