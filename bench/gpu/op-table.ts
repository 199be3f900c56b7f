/** Where a step's time goes: each operation beside the least it could take. */
import { type Column, tableLine } from '../rows/table.js'
import { type Ceilings, modelShapes, type Work } from './limits.js'
import type { OpTime } from './step-program.js'

interface OpLine extends OpTime {
  share: number
  floorMs: number | null
}

const columns: Column<OpLine>[] = [
  { title: 'operation', width: -38, text: ({ op }) => op },
  { title: 'calls', width: 6, text: ({ calls }) => String(calls) },
  { title: 'ms', width: 9, text: ({ ms }) => ms.toFixed(3) },
  { title: 'share', width: 7, text: ({ share }) => `${(100 * share).toFixed(1)} %` },
  { title: 'floor ms', width: 9, text: ({ floorMs }) => floorMs?.toFixed(3) ?? '–' },
  {
    title: '× floor',
    width: 8,
    text: ({ ms, floorMs }) => (floorMs ? (ms / floorMs).toFixed(2) : '–'),
  },
]

/** @param outsideShare of the step; null: every operation waited, and what is between is unknown */
export function opTable(
  profile: OpTime[],
  { card, outsideShare }: { card: Ceilings | null; outsideShare: number | null },
  work: Work,
): string {
  const total = profile.reduce((sum, { ms }) => sum + ms, 0)
  const lines = profile
    .map((time) => ({ ...time, share: time.ms / total, floorMs: floorOf(time, card, work) }))
    .sort((a, b) => b.ms - a.ms)
  const floor = lines.reduce((sum, { floorMs }) => sum + (floorMs ?? 0), 0)
  const sums = `sum ${total.toFixed(3)} ms, of floors ${floor.toFixed(3)} ms`
  const last = `${sums}; ${
    outsideShare === null
      ? 'every operation waits here'
      : `by the device's clock, ${(100 * outsideShare).toFixed(1)} % of the step between them`
  }`
  return [
    tableLine(columns, ({ title }) => title),
    ...lines.map((line) => tableLine(columns, (column) => column.text(line))),
    last,
  ].join('\n')
}

/** Products at the sustained rate, attention at cuDNN's, all else at the copy rate. */
function floorOf(time: OpTime, card: Ceilings | null, work: Work): number | null {
  if (card === null) return null
  const moved = (time.bytes / card.copy) * 1e3
  if (time.flops === 0) return moved > 0 ? moved : null
  const headSize = (modelShapes[work.model]?.headSize ?? 64) > 64 ? 128 : 64
  const attention = card.attention[`${headSize},${work.seq}`]
  const rate = time.op.startsWith('attention')
    ? attention?.[time.op === 'attention_forward' ? 0 : 1]
    : time.op.endsWith(' fp8')
      ? card.fp8
      : card.bf16
  return rate === undefined ? null : Math.max(moved, (time.flops / rate) * 1e3)
}
