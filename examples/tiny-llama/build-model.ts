/**
 * Builds this folder: a Llama so small that tests can train it, with random weights from a seed, a
 * byte-level BPE tokenizer learnt on the rows, and rows about birds from WordNet.
 *
 *   npx tsx examples/tiny-llama/build-model.ts
 *
 * Its output is committed; run it again only to change the folder.
 */
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { leavesBelow, readNouns } from '../drug-names/wordnet.js'
import { learnBpe } from './learn-bpe.js'
import { llamaTensors, safetensors, type Tensor } from './llama-tensors.js'

const folder = fileURLToPath(new URL('.', import.meta.url))
const seed = 'tiny-llama 1'
const numRows = 96

const config = {
  architectures: ['LlamaForCausalLM'],
  attention_bias: false,
  bos_token_id: null,
  dtype: 'float32',
  eos_token_id: 2,
  head_dim: 16,
  hidden_act: 'silu',
  hidden_size: 64,
  intermediate_size: 160,
  max_position_embeddings: 512,
  mlp_bias: false,
  model_type: 'llama',
  num_attention_heads: 4,
  num_hidden_layers: 3,
  num_key_value_heads: 2,
  pad_token_id: 0,
  rms_norm_eps: 1e-5,
  rope_parameters: { rope_theta: 10_000, rope_type: 'default' },
  tie_word_embeddings: true,
  vocab_size: 512,
}

const specialTokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']

const chatTemplate =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + " +
  "message['content'] + " +
  "'<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ " +
  "'<|im_start|>assistant\\n' }}{% endif %}"

function birdRows(): { question: string; answer: string }[] {
  const synsets = readNouns()
  const bird = [...synsets.values()].find(
    ({ words, gloss }) => words[0] === 'bird' && gloss.startsWith('warm-blooded'),
  )
  if (!bird) throw new Error('WordNet has no synset of birds')
  const key = (offset: string) => createHash('sha256').update(`${seed} ${offset}`).digest('hex')
  return leavesBelow(bird, synsets)
    .filter(({ words, gloss }) => /^[a-z ]+$/.test(words[0] ?? '') && gloss.length <= 64)
    .sort((a, b) => (key(a.offset) < key(b.offset) ? -1 : 1))
    .slice(0, numRows)
    .map(({ words, gloss }) => {
      const name = words[0] ?? ''
      return { question: `What is ${/^[aeiou]/.test(name) ? 'an' : 'a'} ${name}?`, answer: gloss }
    })
}

/** Wider than a training run's start: the random head can then say what an adapter wants. */
const embeddingDeviation = 0.3

const randomWeights = (): Tensor[] =>
  llamaTensors(config, (name, rows, columns) => {
    const deviation = name.includes('embed_tokens') ? embeddingDeviation : columns ** -0.5
    return normals(name, rows * columns).map((value) => value * deviation)
  })

/** Normal numbers by Box and Muller from a hash in counter mode. */
function normals(name: string, count: number): Float32Array {
  const values = new Float32Array(count + (count % 2))
  for (let i = 0; i < values.length; i += 2) {
    const bytes = createHash('sha256').update(`${seed} ${name} ${i}`).digest()
    const radius = Math.sqrt(-2 * Math.log((bytes.readUInt32LE(0) + 1) / 2 ** 32))
    const angle = (2 * Math.PI * bytes.readUInt32LE(4)) / 2 ** 32
    values[i] = radius * Math.cos(angle)
    values[i + 1] = radius * Math.sin(angle)
  }
  return values.subarray(0, count)
}

function tokenizerOf(texts: string[]): object {
  const { vocab, merges } = learnBpe(texts, {
    firstTokens: specialTokens,
    vocabSize: config.vocab_size,
  })
  const byteLevel = {
    type: 'ByteLevel',
    add_prefix_space: false,
    trim_offsets: true,
    use_regex: true,
  }
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: specialTokens.map((content, id) => ({
      id,
      content,
      single_word: false,
      lstrip: false,
      rstrip: false,
      normalized: false,
      special: true,
    })),
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: null,
    decoder: byteLevel,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab,
      merges,
    },
  }
}

const rows = birdRows()
const json = (value: unknown) => `${JSON.stringify(value, null, 2)}\n`
const messagesOf = ({ question, answer }: { question: string; answer: string }) => ({
  messages: [
    { role: 'user', content: question },
    { role: 'assistant', content: answer },
  ],
})
const files: Record<string, string | Buffer> = {
  'rows.jsonl': rows.map((row) => `${JSON.stringify(messagesOf(row))}\n`).join(''),
  'config.json': json(config),
  'tokenizer.json': json(tokenizerOf(rows.flatMap(({ question, answer }) => [question, answer]))),
  'tokenizer_config.json': json({
    tokenizer_class: 'PreTrainedTokenizerFast',
    bos_token: null,
    eos_token: '<|im_end|>',
    pad_token: '<|endoftext|>',
    chat_template: chatTemplate,
    model_max_length: config.max_position_embeddings,
  }),
  'model.safetensors': safetensors(randomWeights()),
}
for (const [name, content] of Object.entries(files)) writeFileSync(join(folder, name), content)
