import { useState } from 'preact/hooks'
import type { FeedJob } from './feed-messages.js'
import { freshnessOf, freshnessText } from './freshness.js'
import type { LiveFeed } from './live-feed.js'
import { applyTheme, nextTheme, rememberedTheme } from './theme.js'

export function Header({ feed }: { feed: LiveFeed }) {
  const view = feed.chosen
  const state = view?.state === 'JOB_STATE_UNSPECIFIED' ? undefined : view?.state
  return (
    <header class="top">
      <span class="brand">
        <Mark /> tunemesh
      </span>
      <label class="picker">
        <span class="visually-hidden">Job</span>
        <select
          value={view?.jobId ?? ''}
          disabled={feed.jobs.length === 0}
          onChange={(event) => choose(feed, event.currentTarget.value)}
        >
          {feed.jobs.length === 0 && <option value="">no jobs</option>}
          {newestFirst(feed.jobs).map((job) => (
            <option key={job.jobId} value={job.jobId}>
              {titleOf(job)}
            </option>
          ))}
        </select>
      </label>
      {state && (
        <span class={`pill state-${state.toLowerCase()}`} data-testid="state">
          {state.toLowerCase()}
        </span>
      )}
      <span class="spacer" />
      <Freshness feed={feed} />
      <ThemeButton />
    </header>
  )
}

function Freshness({ feed }: { feed: LiveFeed }) {
  const freshness = freshnessOf(feed, Date.now())
  return (
    <output class={`freshness ${freshness.kind}`} data-testid="freshness">
      <i aria-hidden="true" />
      {freshnessText(freshness)}
    </output>
  )
}

function ThemeButton() {
  const [theme, setTheme] = useState(rememberedTheme)
  const turn = () => {
    const next = nextTheme(theme)
    applyTheme(next)
    setTheme(next)
  }
  return (
    <button type="button" class="quiet" onClick={turn} title="Theme: system, light, dark">
      {theme}
    </button>
  )
}

function Mark() {
  return (
    <svg viewBox="0 0 32 32" width="22" height="22" aria-hidden="true">
      <path d="M3 9c5 0 6 14 13 14s8-6 13-6" class="mark-line" />
      <circle cx="29" cy="17" r="2.6" class="mark-dot" />
    </svg>
  )
}

/** The address names the job, so that a reload or a shared link shows the same one. */
function choose(feed: LiveFeed, jobId: string): void {
  feed.choose(jobId)
  const url = new URL(location.href)
  url.searchParams.set('job', jobId)
  history.replaceState(null, '', url)
}

const newestFirst = (jobs: readonly FeedJob[]) =>
  [...jobs].sort((a, b) => (b.createdAtMs ?? 0) - (a.createdAtMs ?? 0))

function titleOf(job: FeedJob): string {
  const name = job.name ? `${job.name} · ` : ''
  return `${name}${job.jobId}`
}
