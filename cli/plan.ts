/** `tunemesh plan`: preflight, memory and length of a job; trains nothing. */
import type { Context } from './context.js'
import { type JobFileOptions, readJobFile } from './job-file.js'
import { withMesh } from './mesh.js'
import { renderPlan, renderPreflight } from './render-plan.js'

export interface PlanOptions extends JobFileOptions {
  device?: string | undefined
}

export async function plan(context: Context, jobPath: string, options: PlanOptions): Promise<void> {
  const request = readJobFile(jobPath, options)
  const { output } = context
  // One worker: the memory plan is the engine's own answer.
  const needs = { numWorkers: 1, device: options.device, isHeld: true }
  const planned = await withMesh(context, needs, (mesh) => mesh.client.plan(request))
  output.record('plan', {
    plan: { ...planned, estimatedSeconds: planned.estimatedSeconds || null },
  })
  if (planned.preflight) {
    for (const line of renderPreflight(planned.preflight, output.style)) output.line(line)
  }
  for (const line of renderPlan(planned, output.style)) output.line(line)
}
