/**
 * A GGUF file's shape and tokenizer as the small files of a Hugging Face folder, so that a whole
 * model trained from one is complete: other programs load the folder, and so do further jobs.
 */
import type { GgufFile } from '../proto/gguf-metadata.js'
import { architectureOf, type ModelConfig } from '../proto/model-config.js'
import { tokenizerFilesFromGguf } from './tokenizer-gguf.js'

/** Name → text. */
export function companionsOfGguf(
  gguf: GgufFile,
  path: string,
  config: ModelConfig,
): Record<string, string> {
  const { tokenizerJson, specialTokens, chatTemplate, configuredStopIds } = tokenizerFilesFromGguf(
    gguf,
    path,
  )
  const bos = gguf.metadata.get('tokenizer.ggml.bos_token_id')
  const ids = {
    ...(typeof bos === 'number' ? { bos_token_id: bos } : {}),
    ...(configuredStopIds.length > 0 ? { eos_token_id: configuredStopIds } : {}),
  }
  return inText({
    'config.json': { ...configJson(config), ...ids },
    'generation_config.json': ids,
    'tokenizer.json': tokenizerJson,
    'tokenizer_config.json': {
      tokenizer_class: 'PreTrainedTokenizerFast',
      clean_up_tokenization_spaces: false,
      model_max_length: config.maxPositionEmbeddings,
      ...specialTokens,
      ...(chatTemplate === null ? {} : { chat_template: chatTemplate }),
    },
  })
}

/** `modelConfigFromJson` reads it back to the same. GGUF files scale linearly or not at all. */
function configJson(config: ModelConfig): Record<string, unknown> {
  const { family, rotaryScaling, slidingWindow } = config
  const isQwen = family === 'qwen2' || family === 'qwen3'
  const hasWindow = slidingWindow > 0
  return {
    architectures: [architectureOf(family)],
    model_type: family,
    torch_dtype: 'float32',
    hidden_act: 'silu',
    vocab_size: config.vocabSize,
    hidden_size: config.hiddenSize,
    intermediate_size: config.intermediateSize,
    num_hidden_layers: config.numLayers,
    num_attention_heads: config.numHeads,
    num_key_value_heads: config.numKvHeads,
    head_dim: config.headSize,
    max_position_embeddings: config.maxPositionEmbeddings,
    rms_norm_eps: config.rmsNormEpsilon,
    rope_theta: config.rotaryTheta,
    ...(rotaryScaling.kind === 'linear'
      ? { rope_scaling: { rope_type: 'linear', factor: rotaryScaling.factor } }
      : {}),
    ...(family === 'llama' ? {} : { sliding_window: hasWindow ? slidingWindow : null }),
    ...(isQwen ? { use_sliding_window: hasWindow, max_window_layers: 0 } : {}),
    tie_word_embeddings: config.tieWordEmbeddings,
  }
}

const inText = (files: Record<string, object>): Record<string, string> =>
  Object.fromEntries(
    Object.entries(files).map(([name, value]) => [name, `${JSON.stringify(value, null, 2)}\n`]),
  )
