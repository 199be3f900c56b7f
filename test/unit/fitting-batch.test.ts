import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Mesh } from '../../coordinator/coordinator.js'
import { Fleet, type FleetWorker } from '../../coordinator/fleet.js'
import { planOn } from '../../coordinator/job-ingest.js'
import type { SettledJob } from '../../coordinator/prepared-job.js'
import { parseTuning } from '../../coordinator/tuning.js'
import type { FromWorker__Output } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { Hello__Output } from '../../proto/gen/tunemesh/v1/Hello.js'
import type { TrainRequest } from '../../proto/train-spec.js'
import { version } from '../../proto/version.js'

/** A worker whose engine needs ten bytes for each token, and a job of ten-token packs. */
function planWith(memoryBytes: number, packsPerMicroBatch: number) {
  const fleet = new Fleet({ deadAfterMs: 1_000, nowMs: () => 0, maxWorkers: 1 })
  const worker: FleetWorker = fleet.attach(
    { version, device: 'cpu', memoryBytes } as Hello__Output,
    {
      end: () => {},
      send: ({ planCall }) => {
        const { spec } = JSON.parse(planCall?.trainSpecJson ?? '') as TrainRequest
        const memory = { totalBytes: spec.tokensPerMicroBatch * 10, uses: [] }
        const planResult = { callId: planCall?.callId, memory, numBlocks: 8, error: null }
        queueMicrotask(() => fleet.receive(worker, { planResult } as unknown as FromWorker__Output))
      },
    },
  )
  const prepared = {
    spec: { finetuning: 'full' },
    precision: 'fp32',
    train: { longestPack: 10, longestDocument: 10 },
    validations: [],
    schedule: { packsPerMicroBatch },
  } as unknown as SettledJob
  const mesh = { fleet, options: { tuning: parseTuning('{}') } } as unknown as Mesh
  return planOn(mesh, worker, prepared)
}

test('plan: a job that fits exactly is taken', async () => {
  assert.equal((await planWith(800, 8)).answer.memory?.totalBytes, 800)
})

test('plan: one byte short names the nearest batch that fits', async () => {
  await assert.rejects(planWith(799, 8), { code: 'DEVICE_MEMORY_SHORT', message: /from 8 to 7\./ })
  await assert.rejects(planWith(100, 300), { message: /from 300 to 1\./ })
})

test('plan: where not even one pack fits, other settings are named', async () => {
  await assert.rejects(planWith(99, 8), { code: 'DEVICE_MEMORY_SHORT', message: /max_length or r/ })
})
