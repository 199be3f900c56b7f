import type { FeedJob } from './feed-messages.js'
import { formatBytes, formatLearningRate, formatNumber } from './format.js'
import type { JobView } from './job-view.js'

/** Facts of the run that do not move much: settings, memory, what was delivered where. */
export function RunPanel({ view, job }: { view: JobView; job: FeedJob | undefined }) {
  const facts = factsOf(view, job)
  return (
    <section class="panel" aria-label="Run">
      <div class="panel-head">
        <h2>Run</h2>
      </div>
      <dl class="facts">
        {facts.map(([label, value]) => (
          <div key={label}>
            <dt>{label}</dt>
            <dd>{value}</dd>
          </div>
        ))}
      </dl>
    </section>
  )
}

function factsOf(view: JobView, job: FeedJob | undefined): [string, string][] {
  const spec = parsed(job?.specJson)
  const facts: [string, string | number | null | undefined][] = [
    ['Job', view.jobId],
    ['Model', text(spec.model)],
    ['Method', methodOf(spec)],
    ['Learning rate', formatLearningRate(view.points.at(-1)?.learningRate)],
    ['Trained parameters', view.plan?.numTrainedParameters],
    ['Micro-batches a step', view.plan?.microBatchesPerStep],
    ['Skipped steps', view.skippedSteps.length || null],
    ['Tokens seen', view.points.at(-1)?.tokensSoFar],
    ['Memory a worker', view.plan?.memory && formatBytes(view.plan.memory.totalBytes ?? 0)],
    ['Last checkpoint', view.marks.findLast((mark) => mark.kind === 'checkpoint')?.step],
    ['Output', view.artifacts?.outputDir || job?.outputDir],
    ['Weights', shortDigest(view.artifacts?.weightsSha256 ?? job?.weightsSha256)],
  ]
  return facts.flatMap(([label, value]): [string, string][] => {
    if (value === null || value === undefined || value === '') return []
    return [[label, typeof value === 'number' ? formatNumber(value) : value]]
  })
}

function methodOf(spec: Record<string, unknown>): string {
  if (spec.finetuning !== 'lora') return text(spec.finetuning)
  return typeof spec.r === 'number' ? `lora, r = ${spec.r}` : 'lora'
}

const text = (value: unknown) => (typeof value === 'string' ? value : '')

const shortDigest = (digest: string | null | undefined) =>
  digest ? `sha256 ${digest.slice(0, 16)}…` : ''

function parsed(json: string | null | undefined): Record<string, unknown> {
  try {
    return JSON.parse(json || '{}') as Record<string, unknown>
  } catch {
    return {} // a job of another version: its other facts stand
  }
}
