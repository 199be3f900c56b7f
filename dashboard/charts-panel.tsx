import { useMemo, useState } from 'preact/hooks'
import { Chart, type Line } from './chart.js'
import { formatLearningRate, formatLoss, formatNumber } from './format.js'
import type { JobView, Mark, StepPoint } from './job-view.js'
import { smoothed } from './smoothing.js'

const defaultSmoothing = 0.6

export function ChartsPanel({ view }: { view: JobView }) {
  const [smoothing, setSmoothing] = useState(defaultSmoothing)
  const [isLog, setLog] = useState(false)
  const [byTokens, setByTokens] = useState(false)
  const [hovered, setHovered] = useState<number | null>(null)
  const { points } = view
  const x = useColumn(view, (point) => (byTokens ? point.tokensSoFar : point.step), byTokens)
  const loss = useColumn(view, (point) => point.loss)
  const smooth = useMemo(() => smoothed(loss, smoothing), [loss, smoothing])
  const evaluations = useMemo(() => evaluationColumn(view), [loss, view.evaluations])
  const shown = points[hovered ?? points.length - 1]
  const shownSmooth = smooth[hovered ?? points.length - 1]
  const marks = useMemo(() => marksOf(view, byTokens), [view.marks, loss, byTokens])

  return (
    <section class="panel" aria-label="Charts">
      <div class="panel-head">
        <h2>Loss</h2>
        <Readout point={shown} smooth={smoothing > 0 ? shownSmooth : undefined} />
      </div>
      <Chart
        name="Loss"
        summary={lossSummary(points)}
        x={x}
        lines={lossLines(loss, smooth, { evaluations, isSmooth: smoothing > 0 })}
        marks={marks}
        isLog={isLog}
        height={300}
        format={formatTick}
        onCursor={setHovered}
      />
      <Controls
        {...{ smoothing, setSmoothing, isLog, setLog, byTokens, setByTokens }}
        hasEvaluations={view.evaluations.length > 0}
      />
      <RateChart view={view} x={x} onCursor={setHovered} />
      <PointTable points={points} />
    </section>
  )
}

function RateChart(props: {
  view: JobView
  x: readonly number[]
  onCursor: (index: number | null) => void
}) {
  const rate = useColumn(props.view, (point) => point.learningRate)
  const norm = useColumn(props.view, (point) => point.gradNorm)
  return (
    <>
      <div class="panel-head second">
        <h2>Learning rate and gradient norm</h2>
        <span class="legend-row">
          <span class="key rate">learning rate</span>
          <span class="key norm">norm (right)</span>
        </span>
      </div>
      <Chart
        name="Learning rate and gradient norm"
        summary="Both by step."
        x={props.x}
        lines={[
          { label: 'learning rate', color: '--rate', values: rate },
          {
            label: 'gradient norm',
            color: '--norm',
            values: norm,
            width: 1.5,
            dash: [5, 3],
            axis: 'right',
          },
        ]}
        height={170}
        format={formatLearningRate}
        formatRight={formatTick}
        onCursor={props.onCursor}
      />
    </>
  )
}

function Readout({
  point,
  smooth,
}: {
  point?: StepPoint | undefined
  smooth?: number | null | undefined
}) {
  if (!point) return <span class="readout" />
  return (
    <span class="readout" aria-live="off" data-testid="readout">
      <span>
        step <b>{formatNumber(point.step)}</b>
      </span>
      <span class="key loss">
        loss <b>{formatLoss(point.loss)}</b>
      </span>
      {smooth !== undefined && (
        <span>
          smoothed <b>{formatLoss(smooth)}</b>
        </span>
      )}
      <span class="key rate">
        lr <b>{formatLearningRate(point.learningRate)}</b>
      </span>
      <span class="key norm">
        norm <b>{formatLoss(point.gradNorm)}</b>
      </span>
    </span>
  )
}

interface ControlsProps {
  smoothing: number
  setSmoothing: (value: number) => void
  isLog: boolean
  setLog: (value: boolean) => void
  byTokens: boolean
  setByTokens: (value: boolean) => void
  hasEvaluations: boolean
}

function Controls(props: ControlsProps) {
  return (
    <div class="controls">
      <label>
        Smoothing
        <input
          type="range"
          min="0"
          max="0.99"
          step="0.01"
          value={props.smoothing}
          onInput={(event) => props.setSmoothing(Number(event.currentTarget.value))}
        />
        <output>{props.smoothing.toFixed(2)}</output>
      </label>
      <label>
        <input
          type="checkbox"
          checked={props.isLog}
          onChange={(event) => props.setLog(event.currentTarget.checked)}
        />
        Log scale
      </label>
      <label>
        <input
          type="checkbox"
          checked={props.byTokens}
          onChange={(event) => props.setByTokens(event.currentTarget.checked)}
        />
        By tokens
      </label>
      {props.hasEvaluations && <span class="key evaluation">validation</span>}
      <span class="hint">drag zooms, double-click resets</span>
    </div>
  )
}

/** The newest points as numbers, for who would rather read than look. */
function PointTable({ points }: { points: readonly StepPoint[] }) {
  return (
    <details class="points">
      <summary>As a table</summary>
      <table>
        <thead>
          <tr>
            {['Step', 'Loss', 'Norm', 'Learning rate', 'tok/s'].map((head) => (
              <th key={head} scope="col" class="number">
                {head}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {points
            .slice(-50)
            .reverse()
            .map((point) => (
              <tr key={point.step}>
                <td class="number">{point.step}</td>
                <td class="number">{formatLoss(point.loss)}</td>
                <td class="number">{formatLoss(point.gradNorm)}</td>
                <td class="number">{formatLearningRate(point.learningRate)}</td>
                <td class="number">{formatNumber(point.tokensPerSecond)}</td>
              </tr>
            ))}
        </tbody>
      </table>
    </details>
  )
}

function lossLines(
  loss: (number | null)[],
  smooth: (number | null)[],
  extra: { evaluations: (number | null)[]; isSmooth: boolean },
): Line[] {
  const lines: Line[] = extra.isSmooth
    ? [
        { label: 'loss', color: '--loss', values: loss, width: 1, isFaint: true },
        { label: 'smoothed', color: '--loss', values: smooth, width: 2 },
      ]
    : [{ label: 'loss', color: '--loss', values: loss, width: 1.5 }]
  if (extra.evaluations.some((value) => value !== null)) {
    const { evaluations } = extra
    lines.push({ label: 'validation', color: '--evaluation', values: evaluations, isDots: true })
  }
  return lines
}

/** A column of the view's points, made anew only when events have come. */
function useColumn<T>(view: JobView, pick: (point: StepPoint) => T, variant?: unknown): T[] {
  return useMemo(() => view.points.map(pick), [view, view.lastSequence, variant])
}

function evaluationColumn(view: JobView): (number | null)[] {
  const byStep = new Map(view.evaluations.map((it) => [it.step, it.loss]))
  return view.points.map((point) => byStep.get(point.step) ?? null)
}

const markColors: Partial<Record<Mark['kind'], string>> = {
  fleet: '--rate',
  stall: '--bad',
  skip: '--bad',
}

function marksOf(view: JobView, byTokens: boolean) {
  const tokensAt = (step: number) =>
    view.points.findLast((point) => point.step <= step)?.tokensSoFar ?? 0
  return view.marks.flatMap((mark) => {
    const color = markColors[mark.kind]
    if (color === undefined) return []
    return [{ x: byTokens ? tokensAt(mark.step) : mark.step, color }]
  })
}

function lossSummary(points: readonly StepPoint[]): string {
  const finite = points.filter((point) => point.loss !== null)
  const first = finite[0]
  const last = finite.at(-1)
  if (!first || !last) return 'No step yet.'
  return (
    `From ${formatLoss(first.loss)} at step ${first.step} ` +
    `to ${formatLoss(last.loss)} at step ${last.step}.`
  )
}

function formatTick(value: number): string {
  const size = Math.abs(value)
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(0)
  return String(Number(value.toPrecision(6)))
}
