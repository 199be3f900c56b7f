/** A job's events as lines for people. Pure. */
import type { JobEvent } from '../client/client.js'
import type { ErrorInfo__Output as ErrorInfo } from '../proto/gen/tunemesh/v1/ErrorInfo.js'
import type { FleetChanged__Output as FleetChanged } from '../proto/gen/tunemesh/v1/FleetChanged.js'
import type { StepCommitted__Output as Step } from '../proto/gen/tunemesh/v1/StepCommitted.js'
import type { StepSkipped__Output as Skipped } from '../proto/gen/tunemesh/v1/StepSkipped.js'
import { escapeLine } from './escape.js'
import { formatBytes, formatDuration, formatLoss, formatRate } from './format.js'
import { renderPlan, renderPreflight } from './render-plan.js'
import type { Style } from './style.js'

/** Lines of one event; empty for what says nothing new. */
export function renderEvent(event: JobEvent, style: Style): string[] {
  if (event.preflight) return renderPreflight(event.preflight, style)
  if (event.plan) return renderPlan(event.plan, style)
  if (event.step) return [renderStep(event.step)]
  if (event.stepSkipped) return [renderSkip(event.stepSkipped, style)]
  if (event.log) return [renderLog(event, style)]
  if (event.fleet) return [renderFleet(event.fleet, style)]
  if (event.stateChanged) {
    const { state, error } = event.stateChanged
    return [`${style.bold(state.toLowerCase())}${error ? ` ${renderErrorInfo(error, style)}` : ''}`]
  }
  if (event.checkpoint) {
    const { step, seconds, sizeBytes } = event.checkpoint
    const took = formatDuration(seconds * 1_000)
    return [style.dim(`checkpoint of step ${step}: ${formatBytes(sizeBytes)} in ${took}`)]
  }
  if (event.evaluation) {
    const { step, loss, split } = event.evaluation
    return [`step ${step} ${escapeLine(split || 'validation')} loss ${formatLoss(loss)}`]
  }
  return renderRare(event, style)
}

function renderRare(event: JobEvent, style: Style): string[] {
  if (event.stalled) {
    const { workerId, step, waitingFor, seconds } = event.stalled
    const who = workerId ? `worker ${escapeLine(workerId)}` : 'nobody yet'
    return [
      style.warn(
        `step ${step} waits ${formatDuration(seconds * 1_000)} for ${who}: ` +
          escapeLine(waitingFor),
      ),
    ]
  }
  if (event.artifacts) {
    return event.artifacts.artifacts.map((artifact) =>
      style.dim(`delivered ${escapeLine(artifact.path)} (${formatBytes(artifact.sizeBytes)})`),
    )
  }
  return []
}

export function renderStep(step: Step): string {
  const parts = [
    `step ${String(step.step).padStart(String(step.numSteps).length)}/${step.numSteps}`,
    `loss ${formatLoss(step.loss)}`,
    `norm ${formatLoss(step.gradNorm)}`,
    `lr ${step.learningRate.toExponential(2)}`,
    formatRate(step.tokensPerSecond),
  ]
  if (step.step < step.numSteps && step.etaMs > 0) parts.push(`${formatDuration(step.etaMs)} left`)
  return parts.join('  ')
}

function renderSkip(skipped: Skipped, style: Style): string {
  const { step, numSteps, microBatch, reason } = skipped
  const where = `step ${String(step).padStart(String(numSteps).length)}/${numSteps}`
  return style.warn(`${where}  skipped: micro-batch ${microBatch}: ${escapeLine(reason)}`)
}

function renderLog(event: JobEvent, style: Style): string {
  const { level, message, workerId } = event.log ?? { level: '', message: '', workerId: '' }
  const text = `${workerId ? `${escapeLine(workerId)}: ` : ''}${escapeLine(message)}`
  if (level === 'error' || level === 'fatal') return style.bad(text)
  return level === 'warn' ? style.warn(text) : style.dim(text)
}

function renderFleet(fleet: FleetChanged, style: Style): string {
  const live = fleet.workers.filter((worker) => worker.state !== 'gone')
  const names = live.map((worker) => escapeLine(worker.workerId)).join(', ')
  const reason = fleet.reason ? ` (${escapeLine(fleet.reason)})` : ''
  return style.dim(`fleet epoch ${fleet.fleetEpoch}: ${live.length} workers ${names}${reason}`)
}

export function renderErrorInfo(error: ErrorInfo, style: Style): string {
  const details = error.details.map((line) => `\n  ${escapeLine(line)}`).join('')
  return `${style.bad(error.code)} ${escapeLine(error.message)}${details}`
}

/**
 * One step line of many; the job's first and last in any case.
 * @param loggingSteps every how many; null: all of a short job, about a hundred of a long one
 */
export function isStepShown(step: Step, loggingSteps: number | null): boolean {
  const every = loggingSteps ?? Math.max(1, Math.ceil(step.numSteps / 100))
  return step.step === 1 || step.step === step.numSteps || step.step % every === 0
}
