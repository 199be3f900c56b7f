/** I5 and I8 on real processes: what cannot go on says so, and what stands still is named. */
import assert from 'node:assert/strict'
import { readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import type { JobEvent, TunemeshClient } from '../../client/client.js'
import { examplesDir, TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { writeModel } from './same-bits-model.js'

const folder = temporaryFolder()

async function eventsOf(client: TunemeshClient, jobId: string): Promise<JobEvent[]> {
  const events: JobEvent[] = []
  for await (const event of client.watch(jobId)) events.push(event)
  return events
}

/** One row of many has a token that no other has, and whose embedding is infinite. */
function poisonedRow(model: string): { model: string; data: string } {
  const tiny = join(examplesDir, 'tiny-llama')
  const { vocab } = JSON.parse(readFileSync(join(tiny, 'tokenizer.json'), 'utf8')).model
  writeModel(model, { poisonedToken: vocab['¿'] })
  const row = [
    { role: 'user', content: 'What is ÿ?' },
    { role: 'assistant', content: 'a letter' },
  ]
  const data = join(model, 'rows.jsonl')
  const rows = readFileSync(join(tiny, 'rows.jsonl'), 'utf8')
  writeFileSync(data, `${rows}${JSON.stringify({ messages: row })}\n`)
  return { model, data }
}

describe('a non-finite gradient', () => {
  after(() => rmSync(folder, { recursive: true, force: true }))

  it('ends the job with step, micro-batch and tensor; the last checkpoint stays', async (test) => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    test.after(() => coordinator.kill())
    const { client } = coordinator
    const { jobId } = await client.submit(
      tinyJob(join(folder, 'adapter'), {
        ...poisonedRow(join(folder, 'poisoned-row')),
        max_steps: 40,
        gradient_accumulation_steps: 2,
        save_steps: 1,
      }),
    )
    const events = await eventsOf(client, jobId)
    const { state, error } = await client.get(jobId)
    assert.equal(state, 'FAILED')
    assert.match(error?.code ?? '', /^(NON_FINITE_GRADIENT|GRADIENT_OUT_OF_RANGE)$/)
    assert.match(error?.message ?? '', /step \d+/)
    assert.match(error?.message ?? '', /micro-batch \d+/)
    assert.match(error?.message ?? '', /model\.|lora|weight/)
    const numCommitted = events.filter((event) => event.step).length
    const checkpoint = events.filter((event) => event.checkpoint).at(-1)?.checkpoint
    assert.ok(numCommitted >= 1 && (checkpoint?.step ?? 0) >= 1)
    const kept = await client.blobs.stat(checkpoint?.manifestDigest ?? '')
    assert.ok(kept)
    await coordinator.close()
    coordinator.removeState()
  })

  it('of a poisoned weight commits nothing', async (test) => {
    const coordinator = await TestCoordinator.open({ workers: 1 })
    test.after(() => coordinator.kill())
    const model = join(folder, 'poisoned')
    writeModel(model, { poison: Number.POSITIVE_INFINITY })
    const job = await coordinator.client.submit(tinyJob(join(folder, 'output'), { model }))
    const events = await eventsOf(coordinator.client, job.jobId)
    const { state, error } = await coordinator.client.get(job.jobId)
    assert.equal(state, 'FAILED')
    assert.match(error?.message ?? '', /step 1, micro-batch \d+, \S+lora_A\.weight/)
    assert.equal(events.filter((event) => event.step).length, 0)
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('a worker that stands still', () => {
  it('is named within seconds, given up, and does no harm when it wakes', async (test) => {
    const limits = { stallAfterMs: 500, firstBackoffMs: 100, deadAfterMs: 3_000 }
    const tuning = { heartbeatMs: 200, deadAfterMs: 3_000, limits }
    const coordinator = await TestCoordinator.open({ workers: 2, tuning })
    test.after(() => coordinator.kill())
    const { client } = coordinator
    const settings = { max_steps: 30 }
    const calm = await client.submit(tinyJob(join(folder, 'calm'), settings))
    await eventsOf(client, calm.jobId)
    const wanted = (await client.get(calm.jobId)).weightsSha256
    assert.notEqual(wanted, '')

    const { jobId } = await client.submit(tinyJob(join(folder, 'stopped'), settings))
    let sleeper: { workerId: string; processId: number } | undefined
    let stoppedMs = 0
    let namedAfterMs = 0
    let numStepsSince = 0
    for await (const event of client.watch(jobId)) {
      if (event.step?.step === 4 && !sleeper) {
        ;[sleeper] = await client.listWorkers()
        process.kill(sleeper?.processId ?? -1, 'SIGSTOP')
        stoppedMs = performance.now()
      }
      if (event.stalled && event.stalled.workerId === sleeper?.workerId && namedAfterMs === 0) {
        namedAfterMs = performance.now() - stoppedMs
        assert.ok(event.stalled.waitingFor !== '' && event.stalled.step >= 4)
      }
      // Steps go on, so it was declared dead: now the zombie wakes.
      if (namedAfterMs > 0 && event.step && numStepsSince++ === 0) {
        process.kill(sleeper?.processId ?? -1, 'SIGCONT')
      }
    }
    assert.ok(namedAfterMs > 0 && namedAfterMs < 5_000, `named after ${namedAfterMs} ms`)
    assert.ok(numStepsSince > 0)
    const { state, weightsSha256, error } = await client.get(jobId)
    assert.deepEqual([state, error], ['SUCCEEDED', null])
    assert.equal(weightsSha256, wanted)
    await coordinator.close()
    coordinator.removeState()
  })
})
