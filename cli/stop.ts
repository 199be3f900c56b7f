/** `tunemesh stop JOB [--now]`: checkpoint and stop, or stop at once. */
import type { Context } from './context.js'
import { withMesh } from './mesh.js'

export async function stop(
  context: Context,
  jobId: string,
  options: { now: boolean },
): Promise<void> {
  const { output } = context
  await withMesh(context, { numWorkers: 0, isHeld: true }, async ({ client }) => {
    const job = await client.stop(jobId, options)
    output.record('job', { job })
    output.line(`${job.jobId} ${job.state.toLowerCase()} at step ${job.step} of ${job.numSteps}`)
    output.note(`Go on with: tunemesh resume ${job.jobId}`)
  })
}
