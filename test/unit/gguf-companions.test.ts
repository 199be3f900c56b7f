import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, it } from 'node:test'
import { companionsOfGguf } from '../../coordinator/gguf-companions.js'
import { loadTokenizer } from '../../coordinator/tokenizer.js'
import type { GgufFile } from '../../proto/gguf-metadata.js'
import { type ModelConfig, modelConfigFromJson } from '../../proto/model-config.js'

const config: ModelConfig = {
  family: 'llama',
  vocabSize: 6,
  hiddenSize: 64,
  intermediateSize: 128,
  numLayers: 2,
  numHeads: 4,
  numKvHeads: 2,
  headSize: 24,
  maxPositionEmbeddings: 256,
  rmsNormEpsilon: 9.999999747378752e-6,
  rotaryTheta: 100_000,
  rotaryScaling: { kind: 'none' },
  slidingWindow: 0,
  qkvBias: false,
  qkNorm: false,
  tieWordEmbeddings: true,
}
const gguf: GgufFile = {
  version: 3,
  metadata: new Map<string, string | number | boolean | string[] | number[]>([
    ['tokenizer.ggml.model', 'gpt2'],
    ['tokenizer.ggml.pre', 'smollm'],
    ['tokenizer.ggml.tokens', ['<e>', '<s>', 'a', 'b', 'ab', 'Ġ']],
    ['tokenizer.ggml.merges', ['a b']],
    ['tokenizer.ggml.token_type', [3, 3, 1, 1, 1, 1]],
    ['tokenizer.ggml.bos_token_id', 1],
    ['tokenizer.ggml.eos_token_id', 0],
    ['tokenizer.chat_template', '{{ messages }}'],
  ]),
  tensors: [],
}
const made = (changes: Partial<ModelConfig> = {}) =>
  companionsOfGguf(gguf, 'm.gguf', { ...config, ...changes })

describe("a GGUF file's companions", () => {
  it('tell the shape of every family that such a file can have', () => {
    const shapes: Partial<ModelConfig>[] = [
      {},
      { rotaryScaling: { kind: 'linear', factor: 4 }, tieWordEmbeddings: false },
      { family: 'mistral' },
      { family: 'mistral', slidingWindow: 128 },
      { family: 'qwen2', qkvBias: true },
      { family: 'qwen2', qkvBias: true, slidingWindow: 128 },
      { family: 'qwen3', qkNorm: true },
    ]
    for (const shape of shapes) {
      const json = JSON.parse(made(shape)['config.json'] ?? '') as unknown
      assert.deepEqual(modelConfigFromJson(json, 'config.json'), { ...config, ...shape })
    }
  })

  it('make a folder whose tokenizer reads as the file does', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'tunemesh-gguf-'))
    try {
      for (const [name, text] of Object.entries(made())) writeFileSync(join(folder, name), text)
      const tokenizer = await loadTokenizer(folder)
      assert.deepEqual(await tokenizer.encode('ab<e>a', false), [4, 0, 2])
      assert.equal(tokenizer.files.chatTemplate, '{{ messages }}')
      assert.deepEqual(tokenizer.files.specialTokens, { bos_token: '<s>', eos_token: '<e>' })
      assert.deepEqual([...new Set(tokenizer.files.configuredStopIds)], [0])
    } finally {
      rmSync(folder, { recursive: true })
    }
  })
})
