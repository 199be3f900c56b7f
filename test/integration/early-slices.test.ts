/**
 * Real processes: a slice leaves as soon as backward has finished it. A worker dies with its slices
 * on their way and its first LeaseDone not said; what nats-server has got from it by then left
 * before that.
 */
import assert from 'node:assert/strict'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { connectionStatistics } from './read-commit-log.js'
import { writeModel } from './same-bits-model.js'

const layout = { sliceBlocks: 192, chunkBlocks: 64 }
const failpoint = 'worker.before-lease-done'
/** Less than one slice of frames, more than any number of offers for the whole vector. */
const leastFrameBytes = 100_000

const folder = temporaryFolder()
const model = join(folder, 'model')

interface Trial {
  model: string
  /** Of the first worker. */
  failpoints?: string
}

async function train(name: string, { model, failpoints = '' }: Trial) {
  const lines: string[] = []
  const coordinator = await TestCoordinator.open({
    workers: 2,
    tuning: { ...layout, limits: { gatherMs: 60_000 }, workers: [{ failpoints, options: {} }] },
    onLog: (line) => lines.push(line),
  })
  try {
    const { client, stateDir } = coordinator
    const settings = {
      finetuning: 'full',
      model,
      per_device_train_batch_size: 32,
      gradient_accumulation_steps: 2,
      max_steps: 3,
      save_steps: 0,
    }
    const { jobId } = await client.submit(tinyJob(join(folder, name), settings))
    for await (const _ of client.watch(jobId));
    const { state, weightsSha256, error } = await client.get(jobId)
    const closed = await connectionStatistics(stateDir, 'closed')
    return { lines, state, error, weightsSha256, closed }
  } finally {
    await coordinator.kill()
  }
}

describe('slices of a lease', () => {
  before(() => writeModel(model))
  after(() => rmSync(folder, { recursive: true, force: true }))

  it('leave before LeaseDone, and a death after that changes no bit', async () => {
    const undisturbed = await train('undisturbed', { model })
    const killed = await train('killed', { model, failpoints: failpoint })
    for (const { state, error } of [undisturbed, killed]) {
      assert.deepEqual([state, error], ['SUCCEEDED', null])
    }
    assert.ok(killed.lines.includes(`killed at failpoint ${failpoint}`))
    const sent = killed.closed
      .filter(({ role }) => role === 'worker')
      .map(({ in_bytes }) => in_bytes)
    assert.ok(Math.max(...sent) > leastFrameBytes, `the dead worker had sent ${sent} bytes`)
    assert.equal(killed.weightsSha256, undisturbed.weightsSha256)
  })

  it('do not hide a gradient that fails below them: the step is never committed', async () => {
    const steep = join(folder, 'steep')
    writeModel(steep, { isSteep: true })
    const { state, error } = await train('failing', { model: steep })
    assert.equal(state, 'FAILED')
    assert.equal(error?.code, 'GRADIENT_OUT_OF_RANGE')
    assert.match(
      error?.message ?? '',
      /step 1, micro-batch \d, model\.layers\.0\.self_attn\.k_proj/,
    )
  })
})
