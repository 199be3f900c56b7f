import assert from 'node:assert/strict'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import * as grpc from '@grpc/grpc-js'
import type { FromWorker } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { ToWorker__Output } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { channelOptions, WorkerService } from '../../proto/services.js'
import { version } from '../../proto/version.js'
import { examplesDir, TestCoordinator, tinyJob } from './open-coordinator.js'

/** A worker without an engine: a test says what its device is, and sees what it is asked. */
class HollowWorker {
  id = ''
  readonly #client: InstanceType<typeof WorkerService>
  readonly #call: grpc.ClientDuplexStream<FromWorker, ToWorker__Output>
  readonly #heard: ToWorker__Output[] = []
  #wake = () => {}

  constructor({ grpc: address, token }: { grpc: string; token: string }, precisions: string[]) {
    const credentials = grpc.credentials.createInsecure()
    this.#client = new WorkerService(address, credentials, channelOptions)
    const metadata = new grpc.Metadata()
    metadata.set('authorization', `Bearer ${token}`)
    this.#call = this.#client.attach(metadata)
    this.#call.on('error', () => {}) // cancelled by close()
    this.#call.on('data', (message: ToWorker__Output) => {
      this.#heard.push(message)
      this.#wake()
    })
    const device = precisions.includes('bf16') ? 'cuda: hollow' : 'cpu: hollow'
    this.say({ hello: { version, host: 'anvil', device, precisions } })
  }

  say(message: FromWorker): void {
    this.#call.write(message)
  }

  async next<Kind extends keyof ToWorker__Output>(kind: Kind) {
    for (;;) {
      const found = this.#heard.findIndex((message) => message[kind] != null)
      if (found >= 0) return this.#heard.splice(found, 1)[0]?.[kind]
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    }
  }

  close(): void {
    this.#call.cancel()
    this.#client.close()
  }
}

describe('a mesh of devices that differ in what they compute', { timeout: 60_000 }, () => {
  let coordinator: TestCoordinator
  let folder = ''
  const workers: HollowWorker[] = []

  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'tunemesh-precision-'))
    // Hollow workers beat no heart.
    const tuning = { deadAfterMs: 600_000, limits: { deadAfterMs: 600_000 } }
    coordinator = await TestCoordinator.open({ tuning })
  })
  after(async () => {
    for (const worker of workers) worker.close()
    await coordinator.close()
    coordinator.removeState()
    rmSync(folder, { recursive: true, force: true })
  })

  async function attach(...precisions: string[]): Promise<HollowWorker> {
    const worker = new HollowWorker(coordinator.ready, precisions)
    worker.id = (await worker.next('welcome'))?.workerId ?? ''
    workers.push(worker)
    return worker
  }

  /** A copy of the tiny model whose config names this type of its elements. */
  function modelOf(dtype: string): string {
    const model = join(folder, dtype)
    cpSync(join(examplesDir, 'tiny-llama'), model, { recursive: true })
    const path = join(model, 'config.json')
    const config = JSON.parse(readFileSync(path, 'utf8'))
    writeFileSync(path, JSON.stringify({ ...config, dtype }))
    return model
  }

  /** In which precision `worker` is asked to answer with a model. */
  async function answered(worker: HollowWorker, model: string): Promise<string> {
    const pieces = coordinator.client.generate({ model, prompt: 'What?' })
    const first = pieces.next()
    const call = await worker.next('generateCall')
    const { callId = '', precision = '' } = call ?? {}
    worker.say({ generateResult: { callId, done: true, finishReason: 'stop' } })
    assert.equal((await first).done, false)
    await pieces.return()
    return precision
  }

  test('bf16: true is refused at submit while only CPUs are here; nothing is kept', async () => {
    const cpu = await attach('fp32')
    const outputDir = join(folder, 'refused')
    const submitted = coordinator.client.submit(tinyJob(outputDir, { bf16: true }))
    const message = new RegExp(`^job\\.yaml:\\d+ bf16: true needs a GPU; worker ${cpu.id} .*auto`)
    await assert.rejects(submitted, { code: 'JOB_INVALID', message })
    assert.deepEqual(await coordinator.client.list(), [])
  })

  test('a bf16 job is planned on a GPU; the CPU beside it is told why it stays idle', async () => {
    const [cpu] = workers
    const gpu = await attach('fp32', 'bf16')
    const job = await coordinator.client.submit(tinyJob(join(folder, 'gpu'), { bf16: true }))
    const spec = (json: string | undefined) => JSON.parse(json ?? '').spec
    for (let question = 0; question < 2; question++) {
      const call = await gpu.next('planCall')
      assert.equal(spec(call?.trainSpecJson).precision, 'bf16')
      const { callId = '' } = call ?? {}
      gpu.say({ planResult: { callId, numBlocks: 4, memory: { totalBytes: 8 } } })
    }
    assert.equal(spec((await gpu.next('prepare'))?.trainSpecJson).precision, 'bf16')
    const { jobId, reason } = (await cpu?.next('releaseJob')) ?? {}
    assert.equal(jobId, job.jobId)
    assert.equal(reason, 'the job computes in bf16, which its device "cpu: hollow" can not')
    assert.equal((await coordinator.client.get(job.jobId)).precision, 'bf16')
    const listed = await coordinator.client.listWorkers()
    assert.equal(listed.find(({ workerId }) => workerId === cpu?.id)?.state, 'idle')
    await coordinator.client.stop(job.jobId, { now: true })
    await gpu.next('releaseJob')
  })

  test('a model answers in bf16 where it is kept in 16 bits and the worker has it', async () => {
    const [cpu, gpu] = workers
    assert.ok(cpu && gpu)
    assert.equal(await answered(gpu, modelOf('bfloat16')), 'bf16')
    assert.equal(await answered(cpu, modelOf('float32')), 'fp32')
    gpu.close()
    assert.equal(await answered(cpu, modelOf('float16')), 'fp32')
  })
})
