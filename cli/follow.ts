/**
 * Follows a job to its end, shows what happens, and turns Ctrl-C into a stop that can be resumed.
 */
import type { Job, JobEvent } from '../client/client.js'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { loggingStepsOf } from './logging-steps.js'
import type { Mesh } from './mesh.js'
import { progressView } from './progress.js'
import { renderSuccess, type WatchedSteps } from './render-jobs.js'
import { afterEvent, endedJob } from './told-job.js'

/** @throws TunemeshError the job's own error when it failed, JOB_STOPPED when it was stopped */
export async function followJob(
  context: Context,
  mesh: Mesh,
  { job, afterSequence = 0 }: { job: Job; afterSequence?: number },
): Promise<void> {
  const { output } = context
  const { jobId } = job
  const stopNow = new AbortController()
  const view = progressView(output, loggingStepsOf(job))
  const restore = context.interrupts.handle((count) => {
    if (count === 1) void askToStop(context, mesh, jobId)
    else stopNow.abort(stoppedNow(jobId))
  })
  let firstLoss: number | null = null
  let told = job
  const skipped = new Set<number>()
  try {
    const events = mesh.client.watch(jobId, {
      afterSequence,
      signal: AbortSignal.any([stopNow.signal, mesh.signal]),
      onReconnect: () => output.note('The coordinator does not answer; trying again…'),
    })
    for await (const event of events) {
      told = afterEvent(told, event)
      if (event.step) firstLoss ??= event.step.loss
      if (event.stepSkipped) skipped.add(event.stepSkipped.step)
      output.record('event', withoutEmpty(event))
      view.show(withoutLastError(event))
    }
  } catch (error) {
    if (stopNow.signal.aborted) await abandon(mesh, jobId)
    throw error
  } finally {
    view.close()
    restore()
  }
  const numSkipped = skipped.size
  reportEnd(context, await endedJob(mesh.client, told), { firstLoss, numSkipped })
}

function reportEnd({ output }: Context, job: Job, seen: WatchedSteps): void {
  output.record('result', { job })
  if (job.state === 'SUCCEEDED') {
    for (const line of renderSuccess(job, seen, output.style)) output.line(line)
    return
  }
  if (job.state === 'STOPPED') throw stopped(job)
  const { code, message, details } = job.error ?? { code: '', message: '', details: [] }
  throw failureOf(job, { code, message, details })
}

function failureOf(
  job: Job,
  told: { code: string; message: string; details: string[] },
): TunemeshError {
  const message = told.message || `Job ${job.jobId} ended ${job.state.toLowerCase()}.`
  // A code that this version does not know is still a job's failure, not a bug of the command line.
  const code = isErrorCode(told.code) ? told.code : 'WORKER_FAILED'
  return new TunemeshError(code, message, { details: told.details })
}

async function askToStop({ output }: Context, mesh: Mesh, jobId: string): Promise<void> {
  output.note('')
  output.note('Stopping after a checkpoint. Press Ctrl-C again to stop at once.')
  try {
    await mesh.client.stop(jobId)
  } catch (error) {
    output.note(`The coordinator could not be asked to stop: ${(error as Error).message}`)
  }
}

/** The second Ctrl-C: one short try to tell the coordinator, then the mesh is ended under it. */
async function abandon(mesh: Mesh, jobId: string): Promise<void> {
  mesh.hurry()
  const told = mesh.client.stop(jobId, { now: true }).catch(() => {})
  const tooLong = new Promise<void>((resolve) => setTimeout(resolve, 500).unref())
  await Promise.race([told, tooLong])
}

const stopped = (job: Job) =>
  new TunemeshError(
    'JOB_STOPPED',
    `Stopped at step ${job.step} of ${job.numSteps}; the checkpoint is kept. ` +
      `Go on with: tunemesh resume ${job.jobId}`,
  )

const stoppedNow = (jobId: string) =>
  new TunemeshError(
    'JOB_STOPPED',
    `Stopped at once; the last checkpoint is kept. Go on with: tunemesh resume ${jobId}`,
  )

/** Why a job failed is told once, by the error that this command ends with. */
function withoutLastError(event: JobEvent): JobEvent {
  const { stateChanged } = event
  if (stateChanged?.state !== 'FAILED') return event
  return { ...event, stateChanged: { ...stateChanged, error: null } }
}

/** An event without the members of the other kinds, which are null. */
function withoutEmpty(event: object): object {
  return Object.fromEntries(Object.entries(event).filter(([, value]) => value !== null))
}
