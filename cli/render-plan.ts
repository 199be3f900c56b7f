/** Preflight report, memory plan and length of a job, before anything is trained. Pure. */
import type { Plan } from '../client/client.js'
import type { KeptLayers__Output as KeptLayers } from '../proto/gen/tunemesh/v1/KeptLayers.js'
import type { MemoryPlan__Output as MemoryPlan } from '../proto/gen/tunemesh/v1/MemoryPlan.js'
import type { PreflightReport__Output as Report } from '../proto/gen/tunemesh/v1/PreflightReport.js'
import type { RenderedSample__Output as Sample } from '../proto/gen/tunemesh/v1/RenderedSample.js'
import { escapeLine, shorten } from './escape.js'
import {
  formatBytes,
  formatCount,
  formatDuration,
  formatLarge,
  formatPercent,
  sparkline,
} from './format.js'
import { labelled, type Style } from './style.js'

const maxSampleChars = 600

export function renderPreflight(report: Report, style: Style): string[] {
  const rows =
    report.numUsedRows === report.numRows
      ? `${formatCount(report.numRows)} rows`
      : `${formatCount(report.numUsedRows)} of ${formatCount(report.numRows)} rows`
  const held = report.numValidationRows
    ? `, ${formatCount(report.numValidationRows)} held out for validation`
    : ''
  const trained = formatPercent(report.numTargetTokens / report.numTokens)
  const lines = [
    `${report.kind || 'rows'}: ${rows}${held}`,
    `${formatCount(report.numTokens)} tokens in ${formatCount(report.numPacks)} sequences, ` +
      `${formatCount(report.numTargetTokens)} trained (${trained})`,
    stopTokenLine(report, style),
    ...lossOfRows(report, style),
  ]
  return [
    labelled(style, 'Data', lines),
    ...histogramLine(report, style),
    ...report.samples.map((sample) => renderSample(sample, style)),
    ...renderWarnings(report.findings, style),
  ]
}

function stopTokenLine(report: Report, style: Style): string {
  if (report.stopTokenTrained) return 'stop token trained'
  return style.warn('stop token not trained: answers may never end')
}

function lossOfRows(report: Report, style: Style): string[] {
  const parts: string[] = []
  if (report.numTruncatedRows) parts.push(`${rowsOf(report.numTruncatedRows)} truncated`)
  if (report.numDroppedRows) parts.push(`${rowsOf(report.numDroppedRows)} dropped`)
  return parts.length === 0 ? [] : [style.warn(parts.join(', '))]
}

const rowsOf = (count: number) => `${formatCount(count)} ${count === 1 ? 'row' : 'rows'}`

function histogramLine(report: Report, style: Style): string[] {
  if (report.histogram.length === 0) return []
  const bars = sparkline(report.histogram.map((bucket) => bucket.numRows))
  const longest = report.histogram.at(-1)?.upToTokens ?? 0
  return [labelled(style, 'Lengths', `${bars}  rows of up to ${formatCount(longest)} tokens`)]
}

/** What is trained stands out; the rest is dim. Without colour the trained part is in ⟦ ⟧. */
export function renderSample(sample: Sample, style: Style): string {
  let left = maxSampleChars
  let text = ''
  for (const span of sample.spans) {
    if (left <= 0) break
    const shown = shorten(escapeLine(span.text), left)
    left -= shown.length
    text += span.trained ? style.good(`⟦${shown}⟧`) : style.dim(shown)
  }
  const place = `${escapeLine(sample.file)}:${sample.line} (⟦trained⟧)`
  return labelled(style, 'Sample', [place, text])
}

function renderWarnings(warnings: string[], style: Style): string[] {
  return warnings.map((line) => labelled(style, 'Warning', style.warn(escapeLine(line))))
}

/** Steps, memory and time; the preflight report stands by itself. */
export function renderPlan(plan: Plan, style: Style): string[] {
  const steps =
    `${formatCount(plan.numSteps)} steps of ${formatCount(plan.microBatchesPerStep)} ` +
    `micro-batches, ${formatLarge(plan.numTrainedParameters)} trained parameters` +
    (plan.precision ? `, in ${plan.precision}` : '') +
    (plan.freeMode ? ', in free mode: its bits are not promised' : '')
  return [
    labelled(style, 'Plan', steps),
    ...(plan.memory ? [labelled(style, 'Memory', memoryLines(plan.memory))] : []),
    labelled(style, 'Time', timeLines(plan, style)),
    ...renderWarnings(plan.warnings, style),
  ]
}

function timeLines(plan: Plan, style: Style): string[] {
  const basis = escapeLine(plan.timeBasis)
  if (!plan.estimatedSeconds) return [`unknown: ${basis || 'nobody has measured the speed'}`]
  const time = `about ${formatDuration(plan.estimatedSeconds * 1_000)} for the steps`
  return [time, style.dim(basis)]
}

function memoryLines(memory: MemoryPlan): string[] {
  const uses = [...memory.uses].sort((a, b) => b.sizeBytes - a.sizeBytes)
  const shown = uses.slice(0, 6).map((use) => `${formatBytes(use.sizeBytes)} ${use.purpose}`)
  const rest = uses.slice(6).reduce((sum, use) => sum + use.sizeBytes, 0)
  if (rest > 0) shown.push(`${formatBytes(rest)} other`)
  return [
    `${formatBytes(memory.totalBytes)} for each worker`,
    escapeLine(shown.join(', ')),
    ...(memory.layers ? layerLines(memory.layers) : []),
  ]
}

/** What is computed again or lies on the host so that the job fits; nothing where it just does. */
function layerLines(layers: KeptLayers): string[] {
  const { products, attentionHalves, inputs, offloaded } = layers
  const all = layers.everything + products + attentionHalves + inputs + offloaded
  const parts: string[] = []
  if (inputs > 0) parts.push(`${inputs} are computed again in backward`)
  if (attentionHalves > 0) parts.push(`${attentionHalves} in part (gate and up)`)
  if (offloaded > 0) parts.push(`${offloaded} are kept in host memory`)
  const lines = parts.length > 0 ? [`of ${all} layers ${parts.join(', ')}`] : []
  if (layers.embeddingOnHost) lines.push('the embedding is read from host memory')
  return lines
}
