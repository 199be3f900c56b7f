import { formatPercent, formatRate } from './format.js'
import type { WorkerRow } from './job-view.js'

export function WorkersPanel(props: { workers: readonly WorkerRow[]; fleetEpoch: number }) {
  const { workers, fleetEpoch } = props
  return (
    <section class="panel" aria-label="Workers">
      <div class="panel-head">
        <h2>Workers</h2>
        <span class="muted">fleet epoch {fleetEpoch}</span>
      </div>
      {workers.length === 0 ? (
        <p class="empty">
          None has joined. <code>tunemesh worker</code> adds one.
        </p>
      ) : (
        <table class="workers">
          <thead>
            <tr>
              <th scope="col">Worker</th>
              <th scope="col">Share</th>
              <th scope="col" class="number">
                tok/s
              </th>
              <th scope="col">State</th>
            </tr>
          </thead>
          <tbody>
            {workers.map((worker) => (
              <Row key={worker.workerId} worker={worker} />
            ))}
          </tbody>
        </table>
      )}
    </section>
  )
}

function Row({ worker }: { worker: WorkerRow }) {
  const place = [worker.host, worker.device].filter((part) => part !== '').join(' · ')
  return (
    <tr>
      <th scope="row">
        {worker.workerId}
        {place !== '' && <small>{place}</small>}
        {worker.doing !== '' && <small>{worker.doing}</small>}
      </th>
      <td>
        <span class="share">
          <i aria-hidden="true">
            <b style={{ width: `${worker.share * 100}%` }} />
          </i>
          {formatPercent(worker.share)}
        </span>
      </td>
      <td class="number">{formatRate(worker.tokensPerSecond || null)}</td>
      <td>
        <span class={`pill worker-${worker.state || 'unknown'}`}>{worker.state || '–'}</span>
      </td>
    </tr>
  )
}
