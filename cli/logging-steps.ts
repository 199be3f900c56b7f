/** `logging_steps` of a job: every how many steps a line is printed; null: it says nothing. */
import type { Job } from '../client/client.js'

export function loggingStepsOf({ specJson }: Pick<Job, 'specJson'>): number | null {
  if (specJson === '') return null
  const told = (JSON.parse(specJson) as { logging_steps?: unknown }).logging_steps
  return typeof told === 'number' && told >= 1 ? told : null
}
