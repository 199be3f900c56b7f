/** `tunemesh plan`: preflight, memory and length of a job; trains nothing. */
import type { Context } from './context.js'
import { type JobFileOptions, readJobFile } from './job-file.js'
import { withMesh } from './mesh.js'
import { renderPlan, renderPreflight } from './render-plan.js'

export async function plan(
  context: Context,
  jobPath: string,
  options: JobFileOptions,
): Promise<void> {
  const request = readJobFile(jobPath, options)
  const { output } = context
  // One worker: the memory plan is the engine's own answer.
  const planned = await withMesh(context, { numWorkers: 1, isHeld: true }, (mesh) =>
    mesh.client.plan(request),
  )
  output.record('plan', {
    plan: { ...planned, estimatedSeconds: planned.estimatedSeconds || null },
  })
  if (planned.preflight) {
    for (const line of renderPreflight(planned.preflight, output.style)) output.line(line)
  }
  for (const line of renderPlan(planned, output.style)) output.line(line)
}
