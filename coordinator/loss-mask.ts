/**
 * Turns a row into token ids and labels: which tokens are trained.
 *
 * A conversation trains the assistant's words and the one token that ends each of its turns; a
 * prompt with its completion trains the completion and the end token; a text trains everything.
 * Where an assistant's turn starts is found by rendering the messages before it: their text with
 * the generation prompt must be how the whole conversation begins.
 */
import { TunemeshError } from '../proto/errors.js'
import { noTarget } from '../proto/pack-shard.js'
import type { ChatMessage, ChatTemplate } from './chat-template.js'
import type { RowContent } from './rows.js'
import type { Tokenizer } from './tokenizer.js'

export interface TokenizedRow {
  ids: Int32Array
  /** Aligned with ids; -100 where not trained. */
  labels: Int32Array
  /** The end tokens that are trained; empty: the model would not learn to stop. */
  stopIds: number[]
  facts: RowFacts
}

/** What preflight counts. */
export interface RowFacts {
  /** The start token stands twice at the beginning. */
  hasDoubleBos: boolean
  /** A token holds the end of a prompt and the start of an answer; it is trained. */
  hasSharedToken: boolean
  /** The words themselves hold the text of a control token. */
  hasControlText: boolean
}

export interface RowReader {
  tokenizer: Tokenizer
  template: ChatTemplate | null
}

/** @throws TunemeshError CHAT_TEMPLATE_INVALID where the row cannot be rendered */
export async function tokenizeRow(row: RowContent, reader: RowReader): Promise<TokenizedRow> {
  const rendered = await labelled(row, reader)
  const bosId = namedId(reader.tokenizer, 'bos_token')
  const { ids } = rendered
  const words =
    row.kind === 'messages'
      ? row.messages.map(({ content }) => content)
      : row.kind === 'text'
        ? [row.text]
        : [row.prompt, row.completion]
  const control = reader.tokenizer.specialPattern
  return {
    ...rendered,
    ids: Int32Array.from(ids),
    labels: Int32Array.from(rendered.labels),
    facts: {
      hasDoubleBos: bosId !== null && ids[0] === bosId && ids[1] === bosId,
      hasSharedToken: rendered.hasSharedToken,
      hasControlText: control !== null && words.some((text) => text.search(control) >= 0),
    },
  }
}

/** Id of "eos_token" and the like. */
export function namedId(tokenizer: Tokenizer, name: string): number | null {
  const token = tokenizer.files.specialTokens[name]
  return token === undefined ? null : tokenizer.tokenToId(token)
}

interface Labelled {
  ids: number[]
  labels: number[]
  stopIds: number[]
  hasSharedToken: boolean
}

function labelled(row: RowContent, reader: RowReader): Promise<Labelled> {
  if (row.kind === 'messages') return labelledChat(row.messages, reader)
  if (row.kind === 'text') return labelledText(row.text, reader.tokenizer)
  return labelledCompletion(row, reader.tokenizer)
}

async function labelledText(text: string, tokenizer: Tokenizer): Promise<Labelled> {
  const ids = await tokenizer.encode(text, !startsWithBos(text, tokenizer))
  const stopIds = appendEnd(ids, tokenizer)
  return { ids, labels: [...ids], stopIds, hasSharedToken: false }
}

async function labelledCompletion(
  row: { prompt: string; completion: string },
  tokenizer: Tokenizer,
): Promise<Labelled> {
  const addSpecial = !startsWithBos(row.prompt, tokenizer)
  const promptIds = await tokenizer.encode(row.prompt, addSpecial)
  const ids = await tokenizer.encode(row.prompt + row.completion, addSpecial)
  const start = sharedStart(promptIds, ids)
  const stopIds = appendEnd(ids, tokenizer)
  const labels = ids.map((id, i) => (i < start ? noTarget : id))
  return { ids, labels, stopIds, hasSharedToken: start < promptIds.length }
}

/** A text that brings its own start token must not get another. */
function startsWithBos(text: string, tokenizer: Tokenizer): boolean {
  const bos = tokenizer.files.specialTokens.bos_token
  return bos !== undefined && bos !== '' && text.startsWith(bos)
}

/** Ends `ids` with the end token, once; returns the end tokens. */
function appendEnd(ids: number[], tokenizer: Tokenizer): number[] {
  const eosId = namedId(tokenizer, 'eos_token')
  if (eosId === null) return []
  if (ids.at(-1) !== eosId) ids.push(eosId)
  return [eosId]
}

async function labelledChat(messages: ChatMessage[], reader: RowReader): Promise<Labelled> {
  const { tokenizer, template } = reader
  if (!template) {
    throw new TunemeshError(
      'CHAT_TEMPLATE_INVALID',
      'The model has no chat template, which rows of kind messages need. ' +
        'Use an instruct model, add chat_template.jinja to its folder, or give rows of kind text.',
    )
  }
  const text = template.render(messages, false)
  const ids = await tokenizer.encode(text, false)
  const turns: Turn[] = []
  for (const [index, message] of messages.entries()) {
    if (message.role !== 'assistant') continue
    const prefix = prefixBefore(messages.slice(0, index), text, template)
    const prefixIds = await tokenizer.encode(prefix, false)
    const start = sharedStart(prefixIds, ids)
    turns.push({ message, prefix, start, hasSharedToken: start < prefixIds.length })
  }
  const labels = new Array<number>(ids.length).fill(noTarget)
  const stopIds = new Set<number>()
  for (const [index, turn] of turns.entries()) {
    const limit = turns[index + 1]?.start ?? ids.length
    const stop = stopAfter(turn, ids.slice(0, limit), tokenizer)
    const end = stop === null ? await endOfWords(turn, { text, ids, tokenizer }) : stop + 1
    for (let i = turn.start; i < end; i += 1) labels[i] = ids[i] ?? noTarget
    if (stop !== null) stopIds.add(ids[stop] ?? noTarget)
  }
  const hasSharedToken = turns.some((turn) => turn.hasSharedToken)
  return { ids, labels, stopIds: [...stopIds], hasSharedToken }
}

/** One turn of the assistant. */
interface Turn {
  message: ChatMessage
  /** The text before its words. */
  prefix: string
  /** Index of its first token. */
  start: number
  hasSharedToken: boolean
}

/** What stands before an assistant's words in `text`. */
function prefixBefore(before: ChatMessage[], text: string, template: ChatTemplate): string {
  for (const addGenerationPrompt of [true, false]) {
    const prefix =
      before.length === 0 && !addGenerationPrompt
        ? ''
        : template.render(before, addGenerationPrompt)
    if (text.startsWith(prefix)) return prefix
  }
  throw new TunemeshError(
    'CHAT_TEMPLATE_INVALID',
    `The model's chat template renders the first ${before.length} messages differently when ` +
      `more follow, ` +
      "so the assistant's turn cannot be told from the prompt.",
  )
}

/** Number of leading ids that both have. */
function sharedStart(prefix: readonly number[], ids: readonly number[]): number {
  let shared = 0
  while (shared < prefix.length && prefix[shared] === ids[shared]) shared += 1
  return shared
}

/**
 * Index of the control token that ends a turn: the first one after those that the message's own
 * words hold. null where there is none in `ids`.
 */
function stopAfter(turn: Turn, ids: readonly number[], tokenizer: Tokenizer): number | null {
  const { specialPattern, specialIds } = tokenizer
  let ownTokens = specialPattern ? [...turn.message.content.matchAll(specialPattern)].length : 0
  for (let i = turn.start; i < ids.length; i += 1) {
    if (!specialIds.has(ids[i] ?? noTarget)) continue
    if (ownTokens === 0) return i
    ownTokens -= 1
  }
  return null
}

/** Where the words of a turn without an end token end, in tokens. */
async function endOfWords(
  turn: Turn,
  whole: { text: string; ids: number[]; tokenizer: Tokenizer },
): Promise<number> {
  const words = turn.message.content.trim()
  const found = whole.text.indexOf(words, turn.prefix.length)
  if (found < 0) return turn.start
  const throughWords = whole.text.slice(0, found + words.length)
  return sharedStart(await whole.tokenizer.encode(throughWords, false), whole.ids)
}
