// Placeholder until the data part lands: the normalised shape of a decoder.
export type RotaryScaling =
  | { kind: 'none' }
  | { kind: 'linear'; factor: number }
  | { kind: 'llama3'; factor: number; lowFreqFactor: number; highFreqFactor: number; originalMaxPosition: number }

/** A decoder by data: one implementation covers every family. */
export interface ModelConfig {
  family: 'llama' | 'mistral' | 'qwen2' | 'qwen3'
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
