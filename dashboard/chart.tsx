/** A line chart: uPlot draws, this keeps size, theme, zoom and the keyboard's cursor. */
import { useEffect, useRef, useState } from 'preact/hooks'
import uPlot from 'uplot'
import 'uplot/dist/uPlot.min.css'

export interface Line {
  label: string
  /** Name of a custom property of style.css: "--loss". */
  color: string
  values: readonly (number | null)[]
  width?: number
  dash?: number[]
  isFaint?: boolean
  /** Single points, not joined. */
  isDots?: boolean
  axis?: 'left' | 'right'
}

export interface ChartProps {
  name: string
  /** One sentence for who cannot see it. */
  summary: string
  x: readonly number[]
  lines: readonly Line[]
  marks?: readonly { x: number; color: string }[]
  isLog?: boolean
  height: number
  format: (value: number) => string
  formatRight?: (value: number) => string
  onCursor: (index: number | null) => void
}

export function Chart(props: ChartProps) {
  const place = useRef<HTMLDivElement>(null)
  const plot = useRef<uPlot | null>(null)
  const isZoomed = useRef(false)
  const latest = useRef(props)
  latest.current = props
  const theme = useThemeNow()
  const shape = shapeOf(props)
  useEffect(() => {
    const element = place.current
    if (!element) return
    isZoomed.current = false
    const options = optionsFor(latest, element.clientWidth)
    const made = new uPlot(options, dataOf(props), element)
    plot.current = made
    made.over.addEventListener('mouseup', () => {
      isZoomed.current ||= made.select.width > 0
    })
    made.over.addEventListener('dblclick', () => {
      isZoomed.current = false
    })
    const resized = new ResizeObserver(() => {
      made.setSize({ width: element.clientWidth, height: latest.current.height })
    })
    resized.observe(element)
    return () => {
      resized.disconnect()
      made.destroy()
      plot.current = null
    }
  }, [shape, theme])

  useEffect(() => {
    const made = plot.current
    if (!made) return
    // Who looks at a part of the curve must not be thrown back to the whole by new points.
    made.setData(dataOf(props), !isZoomed.current)
    if (isZoomed.current) made.redraw()
  })

  return (
    <div
      ref={place}
      class="chart"
      role="img"
      // biome-ignore lint/a11y/noNoninteractiveTabindex: the arrow keys move its cursor
      tabIndex={0}
      aria-label={`${props.name}. ${props.summary} Arrow keys read single points.`}
      data-testid={`chart-${props.name.toLowerCase().replaceAll(' ', '-')}`}
      data-points={props.x.length}
      onKeyDown={(event) => {
        if (plot.current && moveCursor(plot.current, event.key)) event.preventDefault()
      }}
    />
  )
}

const dataOf = ({ x, lines }: ChartProps) =>
  [x, ...lines.map((line) => line.values)] as unknown as uPlot.AlignedData

/** What needs a new plot when it changes; everything else is only new data. */
const shapeOf = ({ lines, isLog }: ChartProps) =>
  JSON.stringify([isLog, lines.map(({ values: _, ...line }) => line)])

function optionsFor(latest: { current: ChartProps }, width: number): uPlot.Options {
  const props = latest.current
  const { lines, height, isLog = false } = props
  const hasRight = lines.some((line) => line.axis === 'right')
  return {
    width,
    height,
    // Charts above each other share their left and right edges, with or without a right axis.
    padding: [10, hasRight ? 0 : rightAxisPx, 0, 0],
    legend: { show: false },
    cursor: { sync: { key: 'run' }, points: { size: 7 }, y: false, drag: { x: true, y: false } },
    scales: {
      x: { time: false },
      y: { distr: isLog ? 3 : 1 },
      ...(hasRight ? { right: {} } : {}),
    },
    axes: [
      { ...axis({ grid: false }), size: 30 },
      axis({ format: props.format }),
      ...rightAxis(props, hasRight),
    ],
    series: [{}, ...lines.map(seriesOf)],
    hooks: {
      draw: [(plot) => drawMarks(plot, latest.current.marks ?? [])],
      setCursor: [(plot) => latest.current.onCursor(plot.cursor.idx ?? null)],
    },
  }
}

const rightAxisPx = 46

const rightAxis = (props: ChartProps, hasRight: boolean): uPlot.Axis[] =>
  hasRight
    ? [
        {
          ...axis({ format: props.formatRight ?? props.format, grid: false }),
          scale: 'right',
          side: 1,
          size: rightAxisPx,
        },
      ]
    : []

function axis(how: { format?: (value: number) => string; grid?: boolean }): uPlot.Axis {
  const { format, grid = true } = how
  const made: uPlot.Axis = {
    stroke: color('--muted'),
    font: `12px ${getComputedStyle(document.body).fontFamily}`,
    grid: { show: grid, stroke: color('--line'), width: 1 },
    ticks: { show: false },
    gap: 8,
  }
  if (format) {
    made.size = 64
    made.values = (_plot, ticks) => ticks.map((tick) => (tick === null ? '' : format(tick)))
  }
  return made
}

function seriesOf(line: Line): uPlot.Series {
  const stroke = color(line.color)
  const series: uPlot.Series = {
    label: line.label,
    stroke: line.isFaint ? `${stroke}80` : stroke,
    width: line.width ?? 2,
    scale: line.axis === 'right' ? 'right' : 'y',
    points: { show: line.isDots ?? false, size: 8, fill: stroke },
    spanGaps: false,
  }
  if (line.dash) series.dash = line.dash
  if (line.isDots) series.paths = () => null
  return series
}

function drawMarks(plot: uPlot, marks: readonly { x: number; color: string }[]): void {
  const { ctx, bbox } = plot
  ctx.save()
  ctx.setLineDash([3, 4])
  ctx.lineWidth = 1
  for (const mark of marks) {
    const x = Math.round(plot.valToPos(mark.x, 'x', true)) + 0.5
    if (x < bbox.left || x > bbox.left + bbox.width) continue
    ctx.strokeStyle = color(mark.color)
    ctx.beginPath()
    ctx.moveTo(x, bbox.top)
    ctx.lineTo(x, bbox.top + bbox.height)
    ctx.stroke()
  }
  ctx.restore()
}

function moveCursor(plot: uPlot, key: string): boolean {
  const last = plot.data[0].length - 1
  const at = plot.cursor.idx ?? last
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[key]
  if (to === undefined || last < 0) return false
  const index = Math.max(0, Math.min(last, to))
  const x = plot.data[0][index] ?? 0
  plot.setCursor({ left: plot.valToPos(x, 'x'), top: 10 })
  return true
}

const color = (name: string) =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim()

/** Changes when the colours do: canvas does not follow CSS by itself. */
function useThemeNow(): string {
  const [theme, setTheme] = useState(themeNow)
  useEffect(() => {
    const look = () => setTheme(themeNow())
    const system = matchMedia('(prefers-color-scheme: dark)')
    const root = new MutationObserver(look)
    root.observe(document.documentElement, { attributeFilter: ['data-theme'] })
    system.addEventListener('change', look)
    return () => {
      root.disconnect()
      system.removeEventListener('change', look)
    }
  }, [])
  return theme
}

const themeNow = () => color('--loss') + color('--ground')
