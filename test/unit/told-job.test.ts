import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { afterEvent, endedJob } from '../../cli/told-job.js'
import type { Job, JobEvent } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'

const queued = { jobId: 'job-a', state: 'QUEUED', startedAtMs: 0, endedAtMs: 0 } as unknown as Job
const events = [
  { timeMs: 5, stateChanged: { state: 'RUNNING', error: null } },
  { timeMs: 6, step: { step: 4, numSteps: 4, loss: 0.5 } },
  { timeMs: 7, artifacts: { artifacts: [{ path: 'a' }], outputDir: '/o', weightsSha256: 'ab' } },
  { timeMs: 9, stateChanged: { state: 'SUCCEEDED', error: null } },
] as unknown as JobEvent[]
const clientThatFails = (code: 'COORDINATOR_UNREACHABLE' | 'NOT_AUTHENTICATED') => ({
  get: () => Promise.reject(new TunemeshError(code, 'no')),
})
type Client = Parameters<typeof endedJob>[0]

describe('a job whose coordinator ended with the mesh of another command', () => {
  it('is reported as its events told it', async () => {
    const told = events.reduce(afterEvent, queued)
    const job = await endedJob(
      clientThatFails('COORDINATOR_UNREACHABLE') as unknown as Client,
      told,
    )
    assert.deepEqual(job, {
      jobId: 'job-a',
      state: 'SUCCEEDED',
      error: null,
      startedAtMs: 5,
      endedAtMs: 9,
      step: 4,
      numSteps: 4,
      lastLoss: 0.5,
      artifacts: [{ path: 'a' }],
      outputDir: '/o',
      weightsSha256: 'ab',
    })
  })

  it('fails where its end was not told, or where the coordinator answers', async () => {
    const told = events.slice(0, 3).reduce(afterEvent, queued)
    for (const code of ['COORDINATOR_UNREACHABLE', 'NOT_AUTHENTICATED'] as const) {
      const client = clientThatFails(code) as unknown as Client
      await assert.rejects(endedJob(client, told), { code })
    }
    const client = clientThatFails('NOT_AUTHENTICATED') as unknown as Client
    await assert.rejects(endedJob(client, events.reduce(afterEvent, queued)), {
      code: 'NOT_AUTHENTICATED',
    })
  })
})
