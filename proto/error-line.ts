/**
 * How a process tells its parent what ended it: one JSON line on stdout, `{"error": {…}}`. A worker
 * writes it; the coordinator and `tunemesh worker` read it.
 */
import { isErrorCode, TunemeshError } from './errors.js'

export function errorLine(error: unknown): string {
  const known = error instanceof TunemeshError
  const code = known ? error.code : 'INTERNAL'
  const message = error instanceof Error ? error.message : String(error)
  return `${JSON.stringify({ error: { code, message, details: known ? error.details : [] } })}\n`
}

/** The last such line of a text; null: there is none. */
export function lastErrorIn(text: string): TunemeshError | null {
  for (const line of text.split('\n').reverse()) {
    const error = errorOf(line)
    if (error !== null) return error
  }
  return null
}

function errorOf(line: string): TunemeshError | null {
  if (!line.startsWith('{"error":')) return null
  try {
    const { code, message, details } = (JSON.parse(line) as { error: Record<string, unknown> })
      .error
    if (!isErrorCode(code) || typeof message !== 'string') return null
    return new TunemeshError(code, message, {
      details: Array.isArray(details) ? details.map(String) : [],
    })
  } catch {
    return null // cut off, or a library's own words
  }
}

/** The last characters of what a child writes on its stdout; what it wrote before is dropped. */
export class OutputTail {
  static readonly #maxCharacters = 1 << 16
  #text = ''

  constructor(stream: NodeJS.ReadableStream) {
    stream.setEncoding('utf8')
    stream.on('data', (piece: string) => {
      this.#text = (this.#text + piece).slice(-OutputTail.#maxCharacters)
    })
    stream.on('error', () => {}) // the pipe of a dead child
  }

  get text(): string {
    return this.#text
  }
}
