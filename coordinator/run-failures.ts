/** What a worker's report of a failure means for the run. PROTOCOL.md §6, §8. */
import { errorKinds, isErrorCode } from '../proto/errors.js'
import type { WorkerFailure__Output } from '../proto/gen/tunemesh/v1/WorkerFailure.js'
import type { RunFailure } from './run-events.js'
import { maxFailuresInARow, noteFailure } from './run-history.js'
import { declareDead, refuse } from './run-membership.js'
import { failWhereNobodyCan } from './run-stall.js'
import { type FleetWorker, fail, members, type Run } from './run-state.js'
import { skipStep } from './run-steps.js'

export function takeFailure(run: Run, worker: FleetWorker, failure: WorkerFailure__Output): void {
  const code = isErrorCode(failure.error?.code) ? failure.error.code : 'WORKER_FAILED'
  const message = failure.error?.message ?? 'no reason given'
  const where = `worker ${worker.workerId}, step ${failure.step}, micro-batch ${failure.microBatch}`
  if (code === 'NON_FINITE_GRADIENT' || code === 'GRADIENT_OUT_OF_RANGE') {
    if (worker.status !== 'member' || failure.step !== run.log.committedStep + 1) return
    const isSkippable = code === 'NON_FINITE_GRADIENT' && failure.microBatch >= 0
    if (run.config.onNonFinite === 'skip' && isSkippable) return skipStep(run, failure)
    return fail(run, { code, message: `${where}, ${failure.tensor}: ${message}` })
  }
  if (code === 'DEVICE_FAILED') {
    if (failure.microBatch >= 0) return takeDeviceFailure(run, worker, failure)
    // Its process ends by itself, another takes its place.
    return tryAgain(run, worker, { code, message })
  }
  if (code === 'STATE_CONFLICT') {
    // It lacks sums that nobody has any more: it comes back and takes a snapshot.
    return declareDead(run, worker.workerId, message)
  }
  if (worker.status === 'preparing') {
    refuse(run, worker, { level: 'error', reason: `it can not prepare: ${code} ${message}` })
    return failWhereNobodyCan(run, code, message)
  }
  if (errorKinds[code].exit === 2 && members(run).length <= 1) {
    return fail(run, { code, message: `${where}: ${message}` })
  }
  tryAgain(run, worker, { code, message })
}

/**
 * It may come back, unless it fails every time: then it is left idle when it does, and where nobody
 * else is here the run ends.
 */
export function tryAgain(run: Run, worker: FleetWorker, failure: RunFailure): void {
  const { workerId, host } = worker
  const { code, message } = failure
  const inARow = noteFailure(run, worker, failure)
  const isAlone = ![...run.workers.values()].some((w) => w !== worker && w.status !== 'refused')
  if (inARow >= maxFailuresInARow && isAlone) {
    const who = `worker ${workerId} on ${host}, the only one here,`
    const times = `failed ${inARow} times in a row, without a step in between`
    return fail(run, { code, message: `${who} ${times}: ${message}` })
  }
  declareDead(run, workerId, `${code} ${message}`)
}

/**
 * A device tells an error late and can't be used any more: its worker ends its process. Whoever
 * computes the micro-batch next waits for each operation; where it fails again, that names the one.
 */
function takeDeviceFailure(run: Run, worker: FleetWorker, failure: WorkerFailure__Output): void {
  const { step, microBatch, checked } = failure
  const where = `step ${step}, micro-batch ${microBatch}`
  const told = `worker ${worker.workerId} on ${worker.host}: ${failure.error?.message ?? ''}`
  const known = run.suspects.get(step) ?? new Map<number, string>()
  const first = known.get(microBatch)
  if (checked) {
    return fail(run, {
      code: 'DEVICE_FAILED',
      message:
        `${where} failed on a device twice. First ${first ?? 'under an earlier coordinator'} ` +
        `Then, each operation waited for, ${told} Look at the card (nvidia-smi, system log) ` +
        'and resume the job on another one; if that fails alike, report it.',
    })
  }
  run.suspects.set(step, known.set(microBatch, told))
  const message =
    `${where}: ${told} The worker starts anew; the micro-batch is computed again with each ` +
    'operation checked.'
  run.effects.push({ kind: 'event', event: { log: { level: 'warn', message } } })
  tryAgain(run, worker, { code: 'DEVICE_FAILED', message: `${where}: ${told}` })
}
