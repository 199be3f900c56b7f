/** Jobs as tables and summaries. Pure. */
import { join } from 'node:path'
import type { Job } from '../client/client.js'
import { escapeLine, shorten } from './escape.js'
import { formatBytes, formatDuration, formatLoss, formatTime } from './format.js'
import { renderErrorInfo } from './render-event.js'
import { labelled, type Style, table } from './style.js'

export function renderJobs(jobs: Job[]): string[] {
  if (jobs.length === 0) return ['No jobs yet. Start one: tunemesh train job.yaml']
  const rows = jobs.map((job) => [
    escapeLine(job.jobId),
    shorten(escapeLine(job.name || '–'), 24),
    job.state.toLowerCase(),
    job.numSteps ? `${job.step}/${job.numSteps}` : '–',
    job.step ? formatLoss(job.lastLoss) : '–',
    formatTime(job.createdAtMs),
    escapeLine(job.outputDir),
  ])
  return table([['JOB', 'NAME', 'STATE', 'STEP', 'LOSS', 'CREATED', 'OUTPUT'], ...rows])
}

export function renderJob(job: Job, style: Style, nowMs: number): string[] {
  const lines = [
    labelled(
      style,
      'Job',
      `${escapeLine(job.jobId)}${job.name ? ` (${escapeLine(job.name)})` : ''}`,
    ),
    labelled(style, 'State', `${job.state.toLowerCase()}, step ${job.step} of ${job.numSteps}`),
    labelled(style, 'Created', formatTime(job.createdAtMs)),
  ]
  if (job.startedAtMs > 0) {
    const end = job.endedAtMs || nowMs
    lines.push(labelled(style, 'Took', formatDuration(end - job.startedAtMs)))
  }
  if (job.step > 0) lines.push(labelled(style, 'Loss', formatLoss(job.lastLoss)))
  lines.push(labelled(style, 'Output', escapeLine(job.outputDir)))
  for (const artifact of job.artifacts) {
    const size = formatBytes(artifact.sizeBytes)
    lines.push(labelled(style, 'Artifact', `${escapeLine(artifact.path)}  ${size}`))
  }
  if (job.weightsSha256) lines.push(labelled(style, 'Weights', `sha256 ${job.weightsSha256}`))
  if (job.error?.code) lines.push(labelled(style, 'Error', renderErrorInfo(job.error, style)))
  return lines
}

export interface WatchedSteps {
  firstLoss: number | null
  numSkipped: number
}

/** The end of a job that went well: where the result is, and the next thing to do with it. */
export function renderSuccess(job: Job, seen: WatchedSteps, style: Style): string[] {
  const { firstLoss, numSkipped } = seen
  const took = formatDuration(job.endedAtMs - job.startedAtMs)
  const loss =
    firstLoss === null ? '' : `  loss ${formatLoss(firstLoss)} → ${formatLoss(job.lastLoss)}`
  const skipped = numSkipped === 0 ? '' : `, ${numSkipped} of them skipped`
  const adapter = job.artifacts.find((artifact) => artifact.path.endsWith('.safetensors'))
  const main = adapter ? join(job.outputDir, adapter.path) : job.outputDir
  const isAdapter = adapter?.path.includes('adapter') ?? false
  return [
    `${style.good('✓')} ${style.bold('done')} in ${took}, ${job.step} steps${skipped}${loss}`,
    labelled(style, isAdapter ? 'Adapter' : 'Model', style.bold(escapeLine(main))),
    ...(job.weightsSha256 ? [labelled(style, 'Weights', `sha256 ${job.weightsSha256}`)] : []),
    labelled(style, 'Try it', `tunemesh chat ${escapeLine(job.jobId)}`),
  ]
}
