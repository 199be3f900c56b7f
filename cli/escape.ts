/**
 * Text of models, data and workers may carry terminal sequences: they could repaint the screen or
 * worse. Every control byte becomes visible text before it reaches a terminal.
 */

// C0, DEL, C1, and the characters that turn or hide text (bidirectional marks, line separators).
const dangerous = /[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g

/** One line: line breaks are escaped too. */
export const escapeLine = (text: string): string => text.replace(dangerous, escapeChar)

/** Several lines: newline and tab stay. */
export const escapeText = (text: string): string =>
  text.replace(dangerous, (char) => (char === '\n' || char === '\t' ? char : escapeChar(char)))

function escapeChar(char: string): string {
  if (char === '\n') return '\\n'
  if (char === '\r') return '\\r'
  if (char === '\t') return '\\t'
  const code = char.charCodeAt(0)
  return code < 0x100
    ? `\\x${code.toString(16).padStart(2, '0')}`
    : `\\u${code.toString(16).padStart(4, '0')}`
}

export function shorten(text: string, maxChars: number): string {
  const chars = [...text]
  return chars.length <= maxChars ? text : `${chars.slice(0, maxChars - 1).join('')}…`
}
