import { useState } from 'preact/hooks'
import type { EventLine } from './event-lines.js'
import { formatClock } from './format.js'

const numShownAtFirst = 12

export function EventsPanel({ lines }: { lines: readonly EventLine[] }) {
  const [isWhole, setWhole] = useState(false)
  const newestFirst = lines.slice(isWhole ? 0 : -numShownAtFirst).reverse()
  return (
    <section class="panel" aria-label="Events">
      <div class="panel-head">
        <h2>Events</h2>
        {lines.length > numShownAtFirst && (
          <button type="button" class="quiet" onClick={() => setWhole(!isWhole)}>
            {isWhole ? 'fewer' : `all ${lines.length}`}
          </button>
        )}
      </div>
      {lines.length === 0 && <p class="empty">Nothing yet.</p>}
      <ol class="events" data-testid="events">
        {newestFirst.map((line) => (
          <li key={line.sequence} class={line.level} data-sequence={line.sequence}>
            <time dateTime={new Date(line.timeMs).toISOString()}>{formatClock(line.timeMs)}</time>
            <i aria-hidden="true">{marks[line.level]}</i>
            <span>{line.text}</span>
          </li>
        ))}
      </ol>
    </section>
  )
}

/** The shape says it too: colour alone is not for everyone. */
const marks = { info: '·', good: '✓', warn: '▲', bad: '✕' } as const
