/** A job's events as readable lines: what, who, effect. Pure. */
import type { FeedEvent } from './feed-messages.js'
import { formatBytes, formatDuration, formatLoss, formatNumber } from './format.js'

type Level = 'info' | 'good' | 'warn' | 'bad'

export interface EventLine {
  sequence: number
  timeMs: number
  level: Level
  text: string
}

/** Steps are drawn, not listed. */
export function linesOfEvent(event: FeedEvent): EventLine[] {
  const told = toldBy(event)
  if (told === null) return []
  const [level, text] = told
  return [{ sequence: event.sequence, timeMs: event.timeMs, level, text: visible(text) }]
}

/** Control bytes of models and logs as visible text. */
const visible = (text: string) =>
  text.replace(/[\x00-\x1f\x7f]/g, (char) => {
    const code = char.charCodeAt(0).toString(16).padStart(2, '0')
    return char === '\n' ? ' ' : `\\x${code}`
  })

function toldBy(event: FeedEvent): [Level, string] | null {
  if (event.stateChanged) return stateLine(event.stateChanged)
  if (event.log) return logLine(event.log)
  if (event.fleet) return fleetLine(event.fleet)
  if (event.stepSkipped) {
    const { step, microBatch, reason } = event.stepSkipped
    return ['warn', `Step ${step ?? 0} skipped: micro-batch ${microBatch ?? 0}: ${reason ?? ''}`]
  }
  if (event.stalled) {
    const { step, workerId, waitingFor, seconds } = event.stalled
    const who = workerId ? ` for ${workerId}` : ''
    const waited = formatDuration((seconds ?? 0) * 1_000)
    return ['warn', `Step ${step ?? 0} has waited ${waited}${who}: ${waitingFor ?? ''}`]
  }
  if (event.checkpoint) {
    const { step, sizeBytes, seconds } = event.checkpoint
    const took = formatDuration((seconds ?? 0) * 1_000)
    return ['good', `Checkpoint of step ${step ?? 0}: ${formatBytes(sizeBytes ?? 0)} in ${took}`]
  }
  if (event.evaluation) {
    const { step, loss, split } = event.evaluation
    return ['info', `Step ${step ?? 0}: ${split || 'validation'} loss ${formatLoss(loss)}`]
  }
  return rareLine(event)
}

function rareLine(event: FeedEvent): [Level, string] | null {
  if (event.preflight) {
    const { numUsedRows, numTokens, findings } = event.preflight
    const warnings = findings?.length ? `, ${findings.length} warnings` : ''
    return [
      findings?.length ? 'warn' : 'info',
      `Data checked: ${formatNumber(numUsedRows ?? 0)} rows, ` +
        `${formatNumber(numTokens ?? 0)} tokens${warnings}`,
    ]
  }
  if (event.plan) {
    const memory = event.plan.memory?.totalBytes
    const needs = memory ? `, ${formatBytes(memory)} a worker` : ''
    return ['info', `Planned ${formatNumber(event.plan.numSteps ?? 0)} steps${needs}`]
  }
  if (event.artifacts) {
    const { artifacts, outputDir } = event.artifacts
    return ['good', `Delivered ${artifacts?.length ?? 0} files to ${outputDir ?? ''}`]
  }
  return null
}

function stateLine(changed: NonNullable<FeedEvent['stateChanged']>): [Level, string] {
  const state = (changed.state ?? '').toLowerCase()
  const code = changed.error?.code
  const why = code ? `: ${code} ${changed.error?.message ?? ''}` : ''
  if (state === 'failed') return ['bad', `Job failed${why}`]
  if (state === 'paused') return ['warn', `Job paused${why}`]
  return [state === 'succeeded' ? 'good' : 'info', `Job ${state}${why}`]
}

function logLine(log: NonNullable<FeedEvent['log']>): [Level, string] {
  const text = `${log.workerId ? `${log.workerId}: ` : ''}${log.message ?? ''}`
  if (log.level === 'error' || log.level === 'fatal') return ['bad', text]
  return [log.level === 'warn' ? 'warn' : 'info', text]
}

function fleetLine(fleet: NonNullable<FeedEvent['fleet']>): [Level, string] {
  const live = (fleet.workers ?? []).filter((worker) => worker.state !== 'gone').length
  const workers = `${live} ${live === 1 ? 'worker' : 'workers'}`
  const reason = fleet.reason ? `: ${fleet.reason}` : ''
  const isLoss = /lost|died|dead|gone/i.test(fleet.reason ?? '')
  return [isLoss ? 'warn' : 'info', `${workers}, fleet epoch ${fleet.fleetEpoch ?? 0}${reason}`]
}
