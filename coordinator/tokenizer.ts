/**
 * Text to token ids and back, for a Hugging Face folder or a GGUF file.
 *
 * The native library `tokenizers` does the work; where its binary is missing,
 * `@huggingface/tokenizers` does the same in JavaScript, slower. A test compares their ids.
 */
import { existsSync, readFileSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { readGguf } from '../proto/gguf-metadata.js'
import { tokenizerFilesFromGguf } from './tokenizer-gguf.js'

/** What a model says about its tokens, before any library has read it. */
export interface TokenizerFiles {
  /** Parsed tokenizer.json. */
  tokenizerJson: TokenizerJson
  /** "bos_token" → "<|im_start|>" and so on: what chat templates may refer to. */
  specialTokens: Record<string, string>
  chatTemplate: string | null
  /** Ids that end a generation by the model's own configuration. */
  configuredStopIds: number[]
}

interface TokenizerJson {
  added_tokens?: AddedToken[]
  model?: { vocab?: unknown; type?: string; [key: string]: unknown }
  [key: string]: unknown
}

export interface AddedToken {
  id: number
  content: string
  special: boolean
  [key: string]: unknown
}

export interface Tokenizer {
  readonly files: TokenizerFiles
  /** "tokenizers" or "@huggingface/tokenizers". */
  readonly library: string
  /** Control tokens, such as those that end a turn. */
  readonly specialIds: ReadonlySet<number>
  /** Matches any control token's text; null where there is none. */
  readonly specialPattern: RegExp | null
  /** One more than the largest id. */
  readonly vocabSize: number
  encode(text: string, addSpecialTokens: boolean): Promise<number[]>
  decode(ids: readonly number[]): Promise<string>
  tokenToId(token: string): number | null
}

export type TokenizerLibrary = 'native' | 'javascript'

const maxFileBytes = 256 << 20

/** @throws TunemeshError TOKENIZER_INVALID or GGUF_INVALID */
export async function loadTokenizer(
  modelPath: string,
  library?: TokenizerLibrary,
): Promise<Tokenizer> {
  const files = readTokenizerFiles(modelPath)
  try {
    return await withLibrary(files, library)
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    const message = `The tokenizer of ${modelPath} could not be read: ${reason}`
    throw new TunemeshError('TOKENIZER_INVALID', message, { cause })
  }
}

async function withLibrary(files: TokenizerFiles, library?: TokenizerLibrary): Promise<Tokenizer> {
  if (library !== 'javascript') {
    try {
      const { Tokenizer: Native } = await import('tokenizers')
      return nativeTokenizer(files, Native.fromString(JSON.stringify(files.tokenizerJson)))
    } catch (error) {
      if (library === 'native' || !isMissingBinary(error)) throw error
    }
  }
  const { Tokenizer: Portable } = await import('@huggingface/tokenizers')
  return portableTokenizer(files, new Portable(files.tokenizerJson, files.specialTokens))
}

/** The package loads one of many binaries, and says so in these words when there is none. */
const isMissingBinary = (error: unknown): boolean =>
  error instanceof Error &&
  (/native binding|Cannot find (module|package)/i.test(error.message) ||
    (error as NodeJS.ErrnoException).code === 'ERR_DLOPEN_FAILED')

type NativeTokenizer = import('tokenizers').Tokenizer
type PortableTokenizer = import('@huggingface/tokenizers').Tokenizer

function nativeTokenizer(files: TokenizerFiles, native: NativeTokenizer): Tokenizer {
  return {
    ...describeTokens(files),
    library: 'tokenizers',
    encode: async (text, addSpecialTokens) =>
      (await native.encode(text, null, { addSpecialTokens })).getIds(),
    decode: (ids) => native.decode([...ids], false),
    tokenToId: (token) => native.tokenToId(token),
  }
}

function portableTokenizer(files: TokenizerFiles, portable: PortableTokenizer): Tokenizer {
  return {
    ...describeTokens(files),
    library: '@huggingface/tokenizers',
    encode: async (text, addSpecialTokens) =>
      portable.encode(text, { add_special_tokens: addSpecialTokens }).ids,
    decode: async (ids) =>
      ids.length === 0
        ? ''
        : portable.decode([...ids], {
            skip_special_tokens: false,
            clean_up_tokenization_spaces: false,
          }),
    tokenToId: (token) => portable.token_to_id(token) ?? null,
  }
}

function describeTokens(files: TokenizerFiles) {
  const added = files.tokenizerJson.added_tokens ?? []
  const special = added.filter((token) => token.special)
  const escaped = special.map((token) => token.content.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'))
  return {
    files,
    specialIds: new Set(special.map((token) => token.id)),
    specialPattern: escaped.length === 0 ? null : new RegExp(escaped.join('|'), 'g'),
    vocabSize: 1 + added.reduce((most, { id }) => Math.max(most, id), largestId(files)),
  }
}

function largestId({ tokenizerJson }: TokenizerFiles): number {
  const vocab = tokenizerJson.model?.vocab
  if (Array.isArray(vocab)) return vocab.length - 1
  let most = -1
  for (const id of Object.values((vocab ?? {}) as Record<string, number>)) most = Math.max(most, id)
  return most
}

function readTokenizerFiles(modelPath: string): TokenizerFiles {
  if (statSync(modelPath).isFile()) return tokenizerFilesFromGguf(readGguf(modelPath), modelPath)
  const tokenizerPath = join(modelPath, 'tokenizer.json')
  if (!existsSync(tokenizerPath)) {
    throw new TunemeshError(
      'TOKENIZER_INVALID',
      `${tokenizerPath} is missing. A model folder needs it to read text; save the model ` +
        `with its fast tokenizer.`,
    )
  }
  const tokenizerJson = readJson(tokenizerPath) as unknown as TokenizerJson
  const config = readJson(join(modelPath, 'tokenizer_config.json'))
  const map = readJson(join(modelPath, 'special_tokens_map.json'))
  const specialTokens = { ...namedTokens(map), ...namedTokens(config) }
  return {
    tokenizerJson,
    specialTokens,
    chatTemplate: chatTemplateOf(modelPath, config),
    configuredStopIds: [
      ...idsOf(readJson(join(modelPath, 'generation_config.json')).eos_token_id),
      ...idsOf(readJson(join(modelPath, 'config.json')).eos_token_id),
    ],
  }
}

/** A JSON object; an empty one where there is no such file. */
function readJson(path: string): Record<string, unknown> {
  if (!existsSync(path)) return {}
  const size = statSync(path).size
  if (size > maxFileBytes) {
    const message = `${path} has ${size} bytes, at most ${maxFileBytes}.`
    throw new TunemeshError('TOKENIZER_INVALID', message)
  }
  try {
    const value: unknown = JSON.parse(readFileSync(path, 'utf8'))
    if (typeof value === 'object' && value !== null) return value as Record<string, unknown>
    throw new Error('not a JSON object')
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    const message = `${basename(path)} of the model is broken: ${reason}. Path: ${path}`
    throw new TunemeshError('TOKENIZER_INVALID', message, { cause })
  }
}

/** Every "…_token" entry, whether a text or an object with its text as content. */
function namedTokens(config: Record<string, unknown>): Record<string, string> {
  const tokens: Record<string, string> = {}
  for (const [key, value] of Object.entries(config)) {
    if (!key.endsWith('_token')) continue
    const content = (value as { content?: unknown } | null)?.content ?? value
    if (typeof content === 'string') tokens[key] = content
  }
  return tokens
}

function chatTemplateOf(modelPath: string, config: Record<string, unknown>): string | null {
  const file = join(modelPath, 'chat_template.jinja')
  if (existsSync(file)) return readFileSync(file, 'utf8')
  const given = config.chat_template
  if (typeof given === 'string') return given
  if (!Array.isArray(given)) return null
  const named = given as { name?: unknown; template?: unknown }[]
  const chosen = named.find(({ name }) => name === 'default') ?? named[0]
  return typeof chosen?.template === 'string' ? chosen.template : null
}

const idsOf = (value: unknown): number[] =>
  [value].flat().filter((id): id is number => Number.isSafeInteger(id))
