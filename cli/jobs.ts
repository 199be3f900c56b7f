/** `tunemesh jobs [JOB]`: all jobs, or one of them in full. */
import type { Context } from './context.js'
import { withMesh } from './mesh.js'
import { renderJob, renderJobs } from './render-jobs.js'

export interface JobsOptions {
  limit: number
}

export async function jobs(
  context: Context,
  jobId: string | undefined,
  options: JobsOptions,
): Promise<void> {
  const { output } = context
  await withMesh(context, { numWorkers: 0, isHeld: true }, async ({ client }) => {
    if (jobId !== undefined) {
      const job = await client.get(jobId)
      output.record('job', { job })
      for (const line of renderJob(job, output.style, Date.now())) output.line(line)
      return
    }
    const all = await client.list(options.limit)
    output.record('jobs', { jobs: all })
    for (const line of renderJobs(all)) output.line(line)
  })
}
