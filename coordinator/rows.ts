/** Reads rows from a JSONL file, one at a time, and names every bad one by file and line. */
import { createReadStream } from 'node:fs'
import { TunemeshError } from '../proto/errors.js'
import type { JobSpec } from '../proto/job-spec.js'
import type { ChatMessage } from './chat-template.js'

export type RowKind = 'messages' | 'prompt_completion' | 'text'

export type RowContent =
  | { kind: 'messages'; messages: ChatMessage[] }
  | { kind: 'prompt_completion'; prompt: string; completion: string }
  | { kind: 'text'; text: string }

export type Row = RowContent & { line: number }

/** A row, or why a line holds none. */
export type ReadRow = Row | { line: number; problem: string }

/** Longer lines are not rows: a file without line ends, or another format. */
const maxLineBytes = 50 << 20

/**
 * Rows in the order of the file; lines of white space hold none.
 *
 * @throws TunemeshError DATA_INVALID where the file cannot be read at all
 */
export async function* readRows(
  path: string,
  kind: JobSpec['kind'],
  maxBytes = maxLineBytes,
): AsyncGenerator<ReadRow> {
  let expected = kind
  for await (const { line, bytes, problem } of readLines(path, maxBytes)) {
    if (problem !== undefined) {
      yield { line, problem }
      continue
    }
    const row = parseLine(bytes, expected)
    if (row === null) continue
    if ('problem' in row) {
      yield { line, problem: row.problem }
      continue
    }
    // The first good row settles what `auto` means.
    expected = row.kind
    yield { ...row, line }
  }
}

interface Line {
  line: number
  bytes: Buffer
  problem?: string
}

/** Splits at line feeds. A line over the limit is reported once and its bytes are passed over. */
async function* readLines(path: string, maxBytes: number): AsyncGenerator<Line> {
  let line = 1
  let kept: Buffer[] = []
  let keptBytes = 0
  let isTooLong = false
  const keep = (piece: Buffer) => {
    keptBytes += piece.length
    isTooLong ||= keptBytes > maxBytes
    if (isTooLong) kept = []
    else if (piece.length > 0) kept.push(piece)
  }
  const finish = (): Line => {
    const bytes = kept.length === 1 && kept[0] ? kept[0] : Buffer.concat(kept)
    const problem = `has more than ${maxBytes} bytes in one line. Put each row on its own.`
    const finished = { line, bytes, ...(isTooLong ? { problem } : {}) }
    line += 1
    kept = []
    keptBytes = 0
    isTooLong = false
    return finished
  }
  try {
    for await (const piece of createReadStream(path) as AsyncIterable<Buffer>) {
      let start = 0
      for (let end = piece.indexOf(10); end >= 0; end = piece.indexOf(10, start)) {
        keep(piece.subarray(start, end))
        yield finish()
        start = end + 1
      }
      keep(piece.subarray(start))
    }
  } catch (cause) {
    throw unreadable(path, cause)
  }
  if (keptBytes > 0) yield finish()
}

function unreadable(path: string, cause: unknown): TunemeshError {
  const code = (cause as NodeJS.ErrnoException).code
  const reasons: Record<string, string> = {
    ENOENT: 'there is no such file',
    EISDIR: 'it is a folder; give a .jsonl file',
    EACCES: 'it may not be read by this user',
  }
  const reason = reasons[code ?? ''] ?? (cause instanceof Error ? cause.message : String(cause))
  return new TunemeshError('DATA_INVALID', `${path}: ${reason}.`, { cause })
}

type Parsed = RowContent | { problem: string } | null

const utf8 = new TextDecoder('utf-8', { fatal: true })

function parseLine(bytes: Buffer, expected: JobSpec['kind']): Parsed {
  let text: string
  try {
    // The decoder drops a byte order mark, which editors put in front of the first line.
    text = utf8.decode(bytes).trim()
  } catch {
    return { problem: 'has bytes that are not UTF-8. Save the file as UTF-8.' }
  }
  if (text === '') return null
  let value: unknown
  try {
    value = JSON.parse(text)
  } catch (error) {
    return { problem: `is not JSON: ${(error as Error).message}` }
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    return {
      problem:
        'is not a JSON object. A row is {"messages": ...}, {"prompt": ...} or {"text": ...}.',
    }
  }
  return rowOf(value as Record<string, unknown>, expected)
}

/** Keys that make a row of a kind; question and answer are a conversation of two turns. */
const keysOfKinds: [RowKind, string[]][] = [
  ['messages', ['messages']],
  ['messages', ['question', 'answer']],
  ['prompt_completion', ['prompt', 'completion']],
  ['text', ['text']],
]

function rowOf(value: Record<string, unknown>, expected: JobSpec['kind']): Parsed {
  const has = (key: string) => Object.hasOwn(value, key)
  const fitting = keysOfKinds.filter(([, keys]) => keys.every(has))
  const wanted = expected === 'auto' ? fitting : fitting.filter(([kind]) => kind === expected)
  if (wanted.length === 0) return { problem: noKind(Object.keys(value), expected, fitting) }
  if (wanted.length > 1) {
    const named = wanted.map(([, keys]) => keys.join('/')).join(' and ')
    return { problem: `fits two kinds, ${named}. Set kind, or leave one of them out.` }
  }
  const [kind, keys] = wanted[0] as [RowKind, string[]]
  if (keys.includes('messages')) return conversation(value.messages)
  const notText = keys.find((key) => typeof value[key] !== 'string')
  if (notText)
    return { problem: `has ${notText} of type ${typeName(value[notText])}, expected text.` }
  const at = (key: string) => value[key] as string
  if (kind === 'text') {
    return at('text') === '' ? { problem: 'has an empty text.' } : { kind, text: at('text') }
  }
  if (kind === 'prompt_completion') {
    const [prompt, completion] = [at('prompt'), at('completion')]
    if (completion === '') return { problem: 'is all prompt: its completion is empty.' }
    return { kind, prompt, completion }
  }
  return conversation([
    { role: 'user', content: at('question') },
    { role: 'assistant', content: at('answer') },
  ])
}

function noKind(keys: string[], expected: string, fitting: [RowKind, string[]][]): string {
  const shown = keys.length === 0 ? 'no keys' : `the keys ${keys.slice(0, 8).join(', ')}`
  if (expected === 'auto' || fitting.length === 0) {
    return `has ${shown}; a row has messages, prompt and completion, or text.`
  }
  return `is of kind ${fitting[0]?.[0]}, but the job's rows are of kind ${expected}.`
}

const roles = ['system', 'user', 'assistant', 'tool']

function conversation(given: unknown): Parsed {
  if (!Array.isArray(given) || given.length === 0) {
    return { problem: 'has messages that are not a list of at least one message.' }
  }
  const messages: ChatMessage[] = []
  for (const [index, message] of given.entries()) {
    const place = `message ${index + 1}`
    if (typeof message !== 'object' || message === null)
      return { problem: `has ${place} that is no object.` }
    const { role, content } = message as Record<string, unknown>
    if (typeof role !== 'string' || !roles.includes(role)) {
      return {
        problem:
          `has ${place} with role ${JSON.stringify(role)}; a role is one of ` +
          `${roles.join(', ')}.`,
      }
    }
    if (typeof content !== 'string') {
      return { problem: `has ${place} with content of type ${typeName(content)}, expected text.` }
    }
    messages.push({ ...(message as object), role, content })
  }
  if (!messages.some(({ role, content }) => role === 'assistant' && content !== '')) {
    return { problem: 'is all prompt: no message of role assistant says anything.' }
  }
  return { kind: 'messages', messages }
}

const typeName = (value: unknown): string =>
  value === undefined
    ? 'nothing'
    : value === null
      ? 'null'
      : Array.isArray(value)
        ? 'list'
        : typeof value
