/** `tunemesh resume [JOB]`: goes on from the last checkpoint and follows to the end. */
import type { TunemeshClient } from '../client/client.js'
import { newestJob } from './chosen-job.js'
import type { Context } from './context.js'
import { followJob } from './follow.js'
import { withMesh } from './mesh.js'
import { labelled } from './style.js'
import { announceMesh, type TrainOptions } from './train.js'

export async function resume(
  context: Context,
  asked: string | undefined,
  options: Pick<TrainOptions, 'workers' | 'threads' | 'device' | 'dashboard'>,
): Promise<void> {
  const { output } = context
  const needs = {
    numWorkers: options.workers ?? 1,
    threadsPerWorker: options.threads ?? 0,
    device: options.device,
    hasDashboard: options.dashboard,
  }
  await withMesh(context, needs, async (mesh) => {
    announceMesh(context, mesh, options)
    const jobId = asked ?? (await newestResumable(mesh.client)).jobId
    const before = await mesh.client.get(jobId)
    // Only what happens from now on is shown; `tunemesh logs` has the rest.
    const afterSequence = canResume(before) ? await lastSequence(mesh.client, jobId) : 0
    const job = await mesh.client.resume(jobId)
    output.record('job', { job })
    const from = `${job.jobId} goes on from step ${job.step} of ${job.numSteps}`
    output.line(labelled(output.style, 'Job', from))
    await followJob(context, mesh, { job, afterSequence })
  })
}

const canResume = (job: { state: string }) => job.state === 'STOPPED' || job.state === 'FAILED'

const newestResumable = (client: TunemeshClient) => newestJob(client, canResume)

/** A job that has ended has a last event, and its watch ends there. */
async function lastSequence(client: TunemeshClient, jobId: string): Promise<number> {
  let last = 0
  for await (const event of client.watch(jobId)) last = event.sequence
  return last
}
