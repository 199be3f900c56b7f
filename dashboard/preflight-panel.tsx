import type { FeedEvent } from './feed-messages.js'
import { formatNumber, formatPercent } from './format.js'

type Preflight = NonNullable<FeedEvent['preflight']>
type Sample = NonNullable<Preflight['samples']>[number]
type Bucket = NonNullable<Preflight['histogram']>[number]

export function PreflightPanel({ report }: { report: Preflight }) {
  const numTokens = report.numTokens ?? 0
  const trained = numTokens > 0 ? (report.numTargetTokens ?? 0) / numTokens : Number.NaN
  return (
    <section class="panel" aria-label="Data">
      <div class="panel-head">
        <h2>Data</h2>
        <span class="muted">{report.kind}</span>
      </div>
      <p>
        {formatNumber(report.numUsedRows ?? 0)} rows, {formatNumber(numTokens)} tokens in{' '}
        {formatNumber(report.numPacks ?? 0)} sequences, {formatPercent(trained)} trained
      </p>
      <Histogram buckets={report.histogram ?? []} />
      {report.stopTokenTrained === false && (
        <p class="warning">The stop token is not trained: answers may never end.</p>
      )}
      {(report.findings ?? []).map((finding) => (
        <p key={finding} class="warning">
          {finding}
        </p>
      ))}
      {(report.samples ?? []).map((sample, i) => (
        <SampleView key={`${sample.file}:${sample.line}`} sample={sample} isOpen={i === 0} />
      ))}
    </section>
  )
}

function Histogram({ buckets }: { buckets: readonly Bucket[] }) {
  if (buckets.length === 0) return null
  const most = Math.max(...buckets.map((bucket) => bucket.numRows ?? 0), 1)
  const last = buckets.at(-1)?.upToTokens ?? 0
  const text = buckets.map((it) => `${it.numRows ?? 0} rows up to ${it.upToTokens ?? 0} tokens`)
  return (
    <figure class="histogram" role="img" aria-label={`Lengths: ${text.join(', ')}`}>
      <div>
        {buckets.map((bucket) => (
          <i
            key={bucket.upToTokens}
            title={`${bucket.numRows ?? 0} rows up to ${bucket.upToTokens ?? 0} tokens`}
            style={{ height: `${Math.max(3, ((bucket.numRows ?? 0) / most) * 100)}%` }}
          />
        ))}
      </div>
      <figcaption>
        <span>row length</span>
        <span>{formatNumber(last)} tokens</span>
      </figcaption>
    </figure>
  )
}

/** The mask is told by an underline as well as by colour. */
function SampleView({ sample, isOpen }: { sample: Sample; isOpen: boolean }) {
  return (
    <details class="sample" open={isOpen}>
      <summary>
        {sample.file}:{sample.line} <span class="legend">trained</span>
      </summary>
      <pre>
        {(sample.spans ?? []).map((span, i) =>
          // Spans have no name but their place, and never move.
          span.trained ? <mark key={i}>{span.text}</mark> : <span key={i}>{span.text}</span>,
        )}
      </pre>
    </details>
  )
}
