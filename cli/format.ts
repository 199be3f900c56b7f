/** Numbers, sizes and times as people read them. Pure. */

export function formatCount(value: number): string {
  return Math.round(value).toLocaleString('en-US')
}

/** 4,917,248 → "4.92 M" */
export function formatLarge(value: number): string {
  for (const [unit, size] of [
    ['B', 1e9],
    ['M', 1e6],
    ['k', 1e3],
  ] as const) {
    if (value >= size) return `${(value / size).toPrecision(3)} ${unit}`
  }
  return formatCount(value)
}

export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB']
  let value = bytes
  let unit = 0
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024
    unit++
  }
  return unit === 0 ? `${value} B` : `${value.toFixed(value < 10 ? 2 : 1)} ${units[unit]}`
}

/** "850 ms", "12.3 s", "4m 05s", "2h 13m" */
export function formatDuration(ms: number): string {
  if (!Number.isFinite(ms) || ms < 0) return '–'
  if (ms < 1_000) return `${Math.round(ms)} ms`
  if (ms < 59_950) return `${(ms / 1_000).toFixed(1)} s`
  const seconds = Math.round(ms / 1_000)
  if (seconds < 3_600) return `${Math.floor(seconds / 60)}m ${twoDigits(seconds % 60)}s`
  const minutes = Math.round(seconds / 60)
  return `${Math.floor(minutes / 60)}h ${twoDigits(minutes % 60)}m`
}

const twoDigits = (value: number) => String(value).padStart(2, '0')

export function formatRate(tokensPerSecond: number): string {
  const digits = tokensPerSecond < 100 ? 1 : 0
  return `${tokensPerSecond.toLocaleString('en-US', { maximumFractionDigits: digits })} tok/s`
}

/** Losses and norms: four digits that matter, without jumping columns. */
export function formatLoss(loss: number): string {
  if (!Number.isFinite(loss)) return String(loss)
  return Math.abs(loss) >= 1_000 || (loss !== 0 && Math.abs(loss) < 1e-3)
    ? loss.toExponential(3)
    : loss.toFixed(4)
}

export function formatPercent(share: number): string {
  return Number.isFinite(share) ? `${Math.round(share * 100)} %` : '–'
}

export function formatTime(ms: number): string {
  if (ms <= 0) return '–'
  const date = new Date(ms)
  const day = `${date.getFullYear()}-${twoDigits(date.getMonth() + 1)}-${twoDigits(date.getDate())}`
  return `${day} ${formatClock(ms)}`
}

export function formatClock(ms: number): string {
  const date = new Date(ms)
  return [date.getHours(), date.getMinutes(), date.getSeconds()].map(twoDigits).join(':')
}

const bars = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█']

/** A histogram or curve in one line; zero stays visible as the lowest bar. */
export function sparkline(values: number[]): string {
  const highest = Math.max(...values, 0)
  if (highest === 0) return bars[0]?.repeat(values.length) ?? ''
  return values
    .map((value) => bars[Math.min(7, Math.round((Math.max(0, value) / highest) * 7))])
    .join('')
}
