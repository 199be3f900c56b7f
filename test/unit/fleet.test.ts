import assert from 'node:assert/strict'
import { test } from 'node:test'
import { renderFleet } from '../../cli/render-fleet.js'
import type { WorkerInfo } from '../../client/client.js'
import { Fleet } from '../../coordinator/fleet.js'
import type { FromWorker__Output } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { Hello__Output } from '../../proto/gen/tunemesh/v1/Hello.js'
import { version } from '../../proto/version.js'

const hello = (from: Partial<Hello__Output> = {}): Hello__Output => ({
  version,
  host: 'anvil',
  device: 'cpu: 2 threads, avx512',
  deviceClass: 'c1a55',
  numThreads: 2,
  memoryBytes: 8 * 2 ** 30,
  processId: 7,
  previousWorkerId: '',
  previousWorkerProof: '',
  name: '',
  precisions: ['fp32'],
  system: 'linux 6.8 x64, Node 20.20.2, 2 × a processor',
  libraries: [],
  ...from,
})
const stream = { send: () => {}, end: () => {} }

function newFleet() {
  const clock = { nowMs: 1_000 }
  const options = { deadAfterMs: 5_000, nowMs: () => clock.nowMs, maxWorkers: 200 }
  return { clock, fleet: new Fleet(options) }
}

test('fleet: what is told of a worker is what it said last, and how long ago', () => {
  const { clock, fleet } = newFleet()
  const worker = fleet.attach(hello(), stream, 'h-1')
  clock.nowMs += 400
  const prepared = { memory: { totalBytes: 3 * 2 ** 20, uses: [] } }
  fleet.receive(worker, { prepared } as unknown as FromWorker__Output)
  const heartbeat = { residentBytes: 100, cpuSeconds: 1, step: 4, doing: 'training' }
  fleet.receive(worker, { heartbeat } as unknown as FromWorker__Output)
  Object.assign(worker, { jobId: 'job-1', state: 'training' })
  clock.nowMs += 600
  const [told] = fleet.list()
  assert.deepEqual(
    [told?.hostId, told?.silentMs, told?.attachedForMs, told?.step, told?.plannedBytes],
    ['h-1', 600, 1_000, 4, 3 * 2 ** 20],
  )
  assert.deepEqual([told?.memoryBytes, told?.deviceMemoryBytes], [100, 8 * 2 ** 30])
})

test('fleet: one that left is told for ten minutes, with the reason, unless it comes back', () => {
  const { clock, fleet } = newFleet()
  const worker = fleet.attach(hello(), stream)
  fleet.streamEnded(worker, 'its connection broke')
  assert.deepEqual(fleet.list(), [])
  const [gone] = fleet.list({ withGone: true })
  assert.deepEqual([gone?.state, gone?.goneReason], ['gone', 'its connection broke'])
  fleet.attach(hello({ previousWorkerId: worker.id }), stream)
  assert.deepEqual(
    fleet.list({ withGone: true }).map(({ state }) => state),
    ['idle'],
  )
  fleet.disconnect(worker.id, 'silent')
  clock.nowMs += 600_000
  assert.deepEqual(fleet.list({ withGone: true }), [])
})

test('fleet: of those that left only the last 64 are kept', () => {
  const { fleet } = newFleet()
  for (let i = 0; i < 100; i++) fleet.streamEnded(fleet.attach(hello(), stream), `left ${i}`)
  const gone = fleet.list({ withGone: true })
  assert.equal(gone.length, 64)
  assert.equal(gone[0]?.goneReason, 'left 99')
})

test('fleet table: hosts with what they run, workers with what they do, a total', () => {
  const { clock, fleet } = newFleet()
  const gpu = hello({
    host: 'forge',
    device: 'cuda: NVIDIA H100',
    libraries: ['cuBLASLt: 13.1.0 at /opt/cuda/lib64/libcublasLt.so.13'],
  })
  const worker = fleet.attach(gpu, stream, 'abcdef0123456789')
  const doing = 'fetching model.safetensors: 1.2 GiB of 15.0 GiB'
  const heartbeat = { residentBytes: 2 ** 20, cpuSeconds: 1, step: 0, doing }
  fleet.receive(worker, { heartbeat } as unknown as FromWorker__Output)
  Object.assign(worker, { jobId: 'job-1', state: 'preparing', share: 0.5, tokensPerSecond: 1_234 })
  const left = fleet.attach(hello(), stream)
  fleet.streamEnded(left, 'the worker ended its stream')
  clock.nowMs += 100
  const lines = renderFleet(fleet.list({ withGone: true }) as unknown as WorkerInfo[])
  const text = lines.join('\n').replaceAll(worker.id, 'w-one').replaceAll(left.id, 'w-two')
  for (const expected of [
    /^HOST +WORKERS +VERSION +SYSTEM +LIBRARIES$/m,
    /^forge \(abcdef01\) +1 +0\.1\.0 +linux 6\.8 x64, .* +cuBLASLt 13\.1\.0$/m,
    /^w-one +forge \(abcdef01\) +cuda: NVIDIA H100 +1\.00 MiB of 8\.00 GiB +preparing +job-1 /m,
    /50 % +1,234 tok\/s +100 ms ago +fetching model\.safetensors: 1\.2 GiB of 15\.0 GiB$/m,
    /^w-two +anvil .* gone .* the worker ended its stream$/m,
    /^1 worker on 1 host, 1,234 tok\/s in the last step$/m,
  ]) {
    assert.match(text, expected)
  }
})

test('fleet table: none at all says how to start one', () => {
  assert.deepEqual(renderFleet([]), ['No workers. Start one: tunemesh worker'])
})

test('fleet: one that drains is let go where it has no part in a job, and only there', () => {
  const { fleet } = newFleet()
  const sent: string[] = []
  const attach = (name: string) => {
    const send = (message: object) => sent.push(`${name} ${Object.keys(message)}`)
    return fleet.attach(hello(), { send, end: () => {} })
  }
  const [free, busy, staying] = [attach('free'), attach('busy'), attach('staying')]
  for (const worker of [free, busy]) {
    fleet.receive(worker, { drain: { reason: 'SIGTERM' } } as unknown as FromWorker__Output)
  }
  busy.jobId = 'job-1'
  fleet.dismissDraining()
  assert.deepEqual(sent, ['free shutdown'])
  assert.equal(staying.state, 'idle')
})
