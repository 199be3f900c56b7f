/** The page: one job at a time, redrawn at most once a frame. */
import { useEffect, useState } from 'preact/hooks'
import { ChartsPanel } from './charts-panel.js'
import { EventsPanel } from './events-panel.js'
import { Header } from './header.js'
import { type JobView, workersNow } from './job-view.js'
import type { LiveFeed } from './live-feed.js'
import { PreflightPanel } from './preflight-panel.js'
import { RunPanel } from './run-panel.js'
import { StatTiles } from './stat-tiles.js'
import { WorkersPanel } from './workers-panel.js'

export function App({ feed }: { feed: LiveFeed }) {
  const nowMs = useFeed(feed)
  const view = feed.chosen
  return (
    <>
      <Header feed={feed} />
      {view === null ? <Waiting isOpen={feed.isOpen} /> : <Job {...{ feed, view, nowMs }} />}
    </>
  )
}

function Job({ feed, view, nowMs }: { feed: LiveFeed; view: JobView; nowMs: number }) {
  const workers = workersNow(view, feed.workers)
  return (
    <main>
      {view.error && <Failure error={view.error} isPaused={view.state === 'PAUSED'} />}
      <StatTiles view={view} nowMs={nowMs} />
      <div class="columns">
        <div class="column">
          <ChartsPanel view={view} />
          <EventsPanel lines={view.lines} />
        </div>
        <div class="column">
          <WorkersPanel workers={workers} fleetEpoch={view.fleetEpoch} />
          <RunPanel view={view} job={feed.jobs.find((job) => job.jobId === view.jobId)} />
          {view.preflight && <PreflightPanel report={view.preflight} />}
        </div>
      </div>
    </main>
  )
}

function Failure(props: { error: NonNullable<JobView['error']>; isPaused: boolean }) {
  const { code, message, details } = props.error
  return (
    <section class="failure" role="alert">
      <h2>{props.isPaused ? 'Paused' : 'Failed'}</h2>
      <p>
        <code>{code}</code> {message}
      </p>
      {details.length > 0 && (
        <ul>
          {details.map((line) => (
            <li key={line}>{line}</li>
          ))}
        </ul>
      )}
    </section>
  )
}

function Waiting({ isOpen }: { isOpen: boolean }) {
  return (
    <main class="waiting">
      <h1>{isOpen ? 'No jobs yet' : 'Connecting…'}</h1>
      <p>
        Start one with <code>tunemesh train job.yaml</code>; it appears here by itself.
      </p>
    </main>
  )
}

/**
 * Redraws when the feed has changed, at most once a frame, and each second for what counts time.
 */
function useFeed(feed: LiveFeed): number {
  const [, redraw] = useState(0)
  useEffect(() => {
    let frame = 0
    const soon = () => {
      frame ||= requestAnimationFrame(() => {
        frame = 0
        redraw((count) => count + 1)
      })
    }
    const stop = feed.start(soon)
    const clock = setInterval(soon, 1_000)
    return () => {
      stop()
      clearInterval(clock)
      cancelAnimationFrame(frame)
    }
  }, [feed])
  return feed.nowMs()
}
