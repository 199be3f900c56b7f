/** A tokenizer.json made from GGUF metadata: byte-level BPE with llama.cpp's pre-tokenizers. */
import { TunemeshError } from '../proto/errors.js'
import type { GgufFile } from '../proto/gguf-metadata.js'
import type { AddedToken, TokenizerFiles } from './tokenizer.js'

/** Values of tokenizer.ggml.token_type. */
const controlToken = 3
const userToken = 4

const byteLevel = (useRegex: boolean) => ({
  type: 'ByteLevel',
  add_prefix_space: false,
  trim_offsets: true,
  use_regex: useRegex,
})

const splitting = (pattern: string, useRegex = false) => ({
  type: 'Sequence',
  pretokenizers: [
    { type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false },
    byteLevel(useRegex),
  ],
})

const modernPattern = (digits: string) =>
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" +
  `\\p{N}${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`

/** How llama.cpp splits text before BPE, by tokenizer.ggml.pre. */
const preTokenizers = new Map<string, object>([
  ['gpt-2', byteLevel(true)],
  // Each digit on its own, before anything else: the space in front of a number stays apart.
  ['smollm', splitting('\\p{N}', true)],
  ['llama-bpe', splitting(modernPattern('{1,3}'))],
  ['qwen2', splitting(modernPattern(''))],
])

/** @throws TunemeshError TOKENIZER_INVALID */
export function tokenizerFilesFromGguf(gguf: GgufFile, path: string): TokenizerFiles {
  const value = (key: string) => gguf.metadata.get(`tokenizer.${key}`)
  const invalid = (problem: string) => new TunemeshError('TOKENIZER_INVALID', `${path}: ${problem}`)
  const model = value('ggml.model')
  if (model !== 'gpt2') {
    throw invalid(`tokenizer.ggml.model is "${String(model)}"; only gpt2 (byte-level BPE) is read`)
  }
  const pre = String(value('ggml.pre') ?? 'gpt-2')
  const preTokenizer = preTokenizers.get(pre)
  if (!preTokenizer) {
    const known = [...preTokenizers.keys()].join(', ')
    throw invalid(`tokenizer.ggml.pre is "${pre}"; known are ${known}`)
  }
  const tokens = texts(value('ggml.tokens'))
  const merges = texts(value('ggml.merges'))
  if (!tokens || !merges) throw invalid('tokenizer.ggml.tokens or .merges is missing or not text')
  const types = value('ggml.token_type')
  if (types !== undefined && (!Array.isArray(types) || types.length !== tokens.length)) {
    throw invalid(
      `tokenizer.ggml.token_type does not have one entry for each of ${tokens.length} tokens`,
    )
  }
  const idAt = (name: string): number | null => {
    const id = value(`ggml.${name}`)
    return typeof id === 'number' && id >= 0 && id < tokens.length ? id : null
  }
  const addsBos = value('ggml.add_bos_token') === true
  const template = value('chat_template')
  return {
    tokenizerJson: {
      version: '1.0',
      truncation: null,
      padding: null,
      added_tokens: addedTokens(tokens, types ?? []),
      normalizer: null,
      pre_tokenizer: preTokenizer,
      post_processor: addsBos ? bosProcessor(tokens, idAt('bos_token_id')) : null,
      decoder: byteLevel(true),
      model: {
        type: 'BPE',
        dropout: null,
        unk_token: null,
        continuing_subword_prefix: null,
        end_of_word_suffix: null,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: pre === 'llama-bpe',
        vocab: Object.fromEntries(tokens.map((token, id) => [token, id])),
        merges,
      },
    },
    specialTokens: namedTokens(tokens, idAt),
    chatTemplate: typeof template === 'string' ? template : null,
    configuredStopIds: ['eos_token_id', 'eot_token_id', 'eom_token_id']
      .map(idAt)
      .filter((id) => id !== null),
  }
}

const texts = (value: unknown): string[] | null =>
  Array.isArray(value) && value.every((item) => typeof item === 'string') ? value : null

function addedTokens(tokens: string[], types: unknown[]): AddedToken[] {
  return tokens.flatMap((content, id) =>
    types[id] === controlToken || types[id] === userToken
      ? [
          {
            id,
            content,
            single_word: false,
            lstrip: false,
            rstrip: false,
            normalized: false,
            special: types[id] === controlToken,
          },
        ]
      : [],
  )
}

/** Puts the start token in front of a text. */
function bosProcessor(tokens: string[], bosId: number | null): object | null {
  if (bosId === null) return null
  const bos = tokens[bosId] ?? ''
  return {
    type: 'TemplateProcessing',
    single: [{ SpecialToken: { id: bos, type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
    pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
    special_tokens: { [bos]: { id: bos, ids: [bosId], tokens: [bos] } },
  }
}

function namedTokens(
  tokens: string[],
  idAt: (name: string) => number | null,
): Record<string, string> {
  const names = { bos_token: 'bos', eos_token: 'eos', unk_token: 'unknown', pad_token: 'padding' }
  return Object.fromEntries(
    Object.entries(names).flatMap(([name, key]) => {
      const id = idAt(`${key}_token_id`)
      return id === null ? [] : [[name, tokens[id] ?? '']]
    }),
  )
}
