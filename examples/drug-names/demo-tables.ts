/** The demo's tables as text; pure. */

export interface SplitLosses {
  before: number
  after: number
}

/** Recorded by `npm run bench -- drug-names-control`: the same training on shuffled answers. */
export interface ControlRecord {
  seenRephrased: number
  neverSeen: number
}

const width = 100

/** Words of a text in lines of at most `columns`. */
function wrapped(text: string, columns: number): string[] {
  const lines: string[] = []
  let line = ''
  for (const word of text.split(/\s+/)) {
    if (line !== '' && line.length + 1 + word.length > columns) {
      lines.push(line)
      line = ''
    }
    line = line === '' ? word : `${line} ${word}`
  }
  return [...lines, line]
}

export function answerTable(questions: string[], before: string[], after: string[]): string {
  const half = Math.floor((width - 3) / 2)
  const row = (left: string, right: string) => `${left.padEnd(half)} | ${right}`.trimEnd()
  const lines: string[] = []
  for (const [index, question] of questions.entries()) {
    const left = wrapped(before[index] ?? '', half)
    const right = wrapped(after[index] ?? '', half)
    lines.push(question, row('  before', '  after'))
    for (let i = 0; i < Math.max(left.length, right.length); i++)
      lines.push(row(left[i] ?? '', right[i] ?? ''))
    lines.push('')
  }
  return lines.join('\n').trimEnd()
}

export function lossTable(
  losses: ReadonlyMap<string, SplitLosses>,
  control: ControlRecord,
): string {
  const line = (name: string, split: string, controlLoss: number) => {
    const { before, after } = losses.get(split) ?? { before: Number.NaN, after: Number.NaN }
    const gain = ((1 - after / controlLoss) * 100).toFixed(0)
    return (
      name.padEnd(40) +
      before.toFixed(3).padStart(8) +
      after.toFixed(3).padStart(8) +
      controlLoss.toFixed(3).padStart(10) +
      `${gain} %`.padStart(12)
    )
  }
  return [
    'Loss on the words of the answers'.padEnd(40) +
      ['before', 'after'].map((text) => text.padStart(8)).join('') +
      'control'.padStart(10) +
      'better by'.padStart(12),
    line('seen entries, asked in other words', 'seen_rephrased', control.seenRephrased),
    line('entries never seen', 'never_seen', control.neverSeen),
    'control: the same training, answers shuffled among questions (recorded, see bench/results)',
  ].join('\n')
}

/** Mean absolute change of the effective weights, layer by layer. */
export function changeTable(changes: { name: string; meanAbsChange: number }[]): string {
  const byLayer = new Map<number, number[]>()
  for (const { name, meanAbsChange } of changes) {
    const layer = Number(/layers\.(\d+)\./.exec(name)?.[1] ?? -1)
    byLayer.set(layer, [...(byLayer.get(layer) ?? []), meanAbsChange])
  }
  const means = [...byLayer].map(([layer, all]) => ({
    layer,
    mean: all.reduce((a, b) => a + b, 0) / all.length,
  }))
  const most = Math.max(...means.map(({ mean }) => mean))
  const bar = (mean: number) => '█'.repeat(Math.max(1, Math.round((mean / most) * 30)))
  return [
    'Mean absolute weight change, by layer',
    ...means.map(
      ({ layer, mean }) =>
        `  layer ${String(layer).padStart(2)}  ${mean.toExponential(2)}  ${bar(mean)}`,
    ),
  ].join('\n')
}
