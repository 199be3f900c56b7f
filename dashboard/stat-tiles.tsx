import type { ComponentChildren } from 'preact'
import { formatDuration, formatLoss, formatNumber, formatPercent, formatRate } from './format.js'
import { isFinal, type JobView, timeLeftMs } from './job-view.js'

export function StatTiles({ view, nowMs }: { view: JobView; nowMs: number }) {
  const last = view.points.at(-1)
  const first = view.points.find((point) => point.loss !== null)
  const left = timeLeftMs(view, nowMs)
  const done = view.numSteps > 0 ? view.step / view.numSteps : 0
  return (
    <section class="tiles" aria-label="Now">
      <Tile label="Loss" value={formatLoss(last?.loss)} name="loss">
        {first && first !== last && `from ${formatLoss(first.loss)}`}
      </Tile>
      <Tile
        label="Step"
        name="step"
        value={formatNumber(view.step)}
        unit={`of ${view.numSteps > 0 ? formatNumber(view.numSteps) : '–'}`}
      >
        <Progress done={done} />
      </Tile>
      <Tile
        label={isFinal(view.state) ? 'Took' : 'Time left'}
        name="time"
        value={formatDuration(isFinal(view.state) ? elapsedMs(view, nowMs) : left)}
      >
        {!isFinal(view.state) && `${formatDuration(elapsedMs(view, nowMs))} so far`}
      </Tile>
      <Tile label="Speed" name="speed" value={formatRate(last?.tokensPerSecond)} unit="tok/s">
        {last && `${formatDuration(last.stepMs)} a step`}
      </Tile>
      <Tile
        label="Exposed"
        name="exposed"
        value={last && last.stepMs > 0 ? formatPercent(last.exposedMs / last.stepMs, 1) : '–'}
        title="Share of a step spent on the last sum, report, commit and apply: what scaling loses"
      >
        {last && `${formatDuration(last.exposedMs)} a step`}
      </Tile>
      <Tile label="Gradient norm" name="norm" value={formatLoss(last?.gradNorm)}>
        {view.dataEpoch > 0 && `data epoch ${formatNumber(view.dataEpoch, 2)}`}
      </Tile>
    </section>
  )
}

interface TileProps {
  label: string
  name: string
  value: string
  unit?: string
  title?: string
  children?: ComponentChildren
}

function Tile({ label, name, value, unit, title, children }: TileProps) {
  return (
    <div class="tile" title={title} data-testid={`tile-${name}`}>
      <h2>{label}</h2>
      <p class="value">
        {value}
        {unit && <small> {unit}</small>}
      </p>
      <div class="under">{children}</div>
    </div>
  )
}

function Progress({ done }: { done: number }) {
  return (
    <div
      class="progress"
      role="progressbar"
      aria-label="Progress"
      aria-valuemin={0}
      aria-valuemax={100}
      aria-valuenow={Math.round(done * 100)}
    >
      <i style={{ width: `${Math.min(1, done) * 100}%` }} />
    </div>
  )
}

function elapsedMs(view: JobView, nowMs: number): number | null {
  if (view.startedAtMs === null) return null
  const end = isFinal(view.state) ? view.stateSinceMs : nowMs
  return Math.max(0, end - view.startedAtMs)
}
