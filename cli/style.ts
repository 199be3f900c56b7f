/** Terminal styles; with colour off each of them gives its text back. */
export interface Style {
  bold(text: string): string
  dim(text: string): string
  good(text: string): string
  warn(text: string): string
  bad(text: string): string
  accent(text: string): string
}

const wrap = (on: number, off: number) => (text: string) => `\x1b[${on}m${text}\x1b[${off}m`
const plain = (text: string) => text

export const coloured: Style = {
  bold: wrap(1, 22),
  dim: wrap(2, 22),
  good: wrap(32, 39),
  warn: wrap(33, 39),
  bad: wrap(31, 39),
  accent: wrap(36, 39),
}

export const uncoloured: Style = {
  bold: plain,
  dim: plain,
  good: plain,
  warn: plain,
  bad: plain,
  accent: plain,
}

/** "Label     text", with following lines under the text. */
export function labelled(style: Style, label: string, lines: string | string[]): string {
  const [first = '', ...rest] = typeof lines === 'string' ? [lines] : lines
  const indent = ' '.repeat(11)
  return [`${style.dim(label.padEnd(11))}${first}`, ...rest.map((line) => indent + line)].join('\n')
}

/** Columns wide enough for what they hold; the last one is not padded. */
export function table(rows: string[][]): string[] {
  const widths: number[] = []
  for (const row of rows) {
    row.forEach((cell, i) => {
      widths[i] = Math.max(widths[i] ?? 0, [...cell].length)
    })
  }
  return rows.map((row) =>
    row
      .map((cell, i) => (i === row.length - 1 ? cell : cell + gap(widths[i] ?? 0, cell)))
      .join('')
      .trimEnd(),
  )
}

const gap = (width: number, cell: string) => ' '.repeat(width - [...cell].length + 2)
