/** The job meant where none was named: the newest one, of those that fit. */
import type { Job, TunemeshClient } from '../client/client.js'
import { TunemeshError } from '../proto/errors.js'

export async function newestJob(
  client: TunemeshClient,
  fits: (job: Job) => boolean = () => true,
): Promise<Job> {
  const jobs = await client.list()
  const job = jobs.filter(fits).sort((a, b) => b.createdAtMs - a.createdAtMs)[0]
  if (job) return job
  throw new TunemeshError(
    'JOB_NOT_FOUND',
    jobs.length === 0
      ? 'There is no job here yet. Start one: tunemesh train job.yaml'
      : 'None of the jobs here fits. Name one; `tunemesh jobs` lists them.',
  )
}
