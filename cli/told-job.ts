/**
 * A job as its own events tell it: what is left to report where the coordinator ended with the mesh
 * of another command, right after the job.
 */
import type { Job, JobEvent } from '../client/client.js'
import { TunemeshError } from '../proto/errors.js'
import { hasEnded, type Mesh } from './mesh.js'

/** The job after one more of its events. */
export function afterEvent(job: Job, event: JobEvent): Job {
  const { stateChanged, step, artifacts, timeMs } = event
  if (stateChanged) {
    const { state, error } = stateChanged
    const startedAtMs = state === 'RUNNING' && job.startedAtMs === 0 ? timeMs : job.startedAtMs
    const endedAtMs = hasEnded({ state }) ? timeMs : 0
    return { ...job, state, error, startedAtMs, endedAtMs }
  }
  if (step) return { ...job, step: step.step, numSteps: step.numSteps, lastLoss: step.loss }
  if (artifacts) return { ...job, ...artifacts }
  return job
}

/** The job's record; `told` where its events have told the end and nobody answers any more. */
export async function endedJob(client: Mesh['client'], told: Job): Promise<Job> {
  try {
    return await client.get(told.jobId)
  } catch (error) {
    const isGone = error instanceof TunemeshError && error.code === 'COORDINATOR_UNREACHABLE'
    if (isGone && hasEnded(told)) return told
    throw error
  }
}
