/**
 * `tunemesh train`: submits a job, shows its preflight and progress, and says where the result
 * lies.
 */

import type { Context } from './context.js'
import { escapeLine } from './escape.js'
import { followJob } from './follow.js'
import { type JobFileOptions, readJobFile } from './job-file.js'
import { type Mesh, withMesh } from './mesh.js'
import { labelled } from './style.js'

export interface TrainOptions extends JobFileOptions {
  workers?: number | undefined
  threads?: number | undefined
  device?: string | undefined
  dashboard: boolean
}

export async function train(
  context: Context,
  jobPath: string,
  options: TrainOptions,
): Promise<void> {
  const request = readJobFile(jobPath, options)
  const needs = {
    numWorkers: options.workers ?? 1,
    threadsPerWorker: options.threads ?? 0,
    device: options.device,
    hasDashboard: options.dashboard,
  }
  await withMesh(context, needs, async (mesh) => {
    announceMesh(context, mesh, options)
    const job = await mesh.client.submit(request)
    context.output.record('job', { job })
    const name = job.name ? ` (${escapeLine(job.name)})` : ''
    context.output.line(labelled(context.output.style, 'Job', `${job.jobId}${name}`))
    await followJob(context, mesh, { job })
  })
}

export function announceMesh(
  { output, stateDir }: Context,
  mesh: Mesh,
  asked: Pick<TrainOptions, 'workers' | 'threads' | 'device'>,
): void {
  const { grpc, dashboard } = mesh.endpoint
  output.record('mesh', { embedded: mesh.isEmbedded, grpc, dashboard, stateDir })
  if (!mesh.isEmbedded) {
    output.note(`Using the coordinator that runs at ${grpc}.`)
    if ([asked.workers, asked.threads, asked.device].some((option) => option !== undefined)) {
      output.note(
        'It has workers of its own: --workers, --threads and --device change nothing here.',
      )
    }
  }
  if (dashboard) output.line(labelled(output.style, 'Dashboard', output.style.accent(dashboard)))
}
