import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import type { Mesh } from '../../coordinator/coordinator.js'
import { Fleet, type FleetWorker } from '../../coordinator/fleet.js'
import {
  askedPrecision,
  assertCanBegin,
  placeOfPrecision,
  precisionAmong,
  settlePrecision,
  statesOf,
  workerFor,
} from '../../coordinator/job-precision.js'
import type { JobRecord } from '../../coordinator/job-store.js'
import type { SettledJob } from '../../coordinator/prepared-job.js'
import type { Hello__Output } from '../../proto/gen/tunemesh/v1/Hello.js'
import { readJobFile } from '../../proto/job-file.js'
import { version } from '../../proto/version.js'
import { precisionsOf } from '../../worker/device.js'

const newFleet = () => new Fleet({ deadAfterMs: 1_000, nowMs: () => 0, maxWorkers: 9 })

const devices = {
  cpu: { device: 'cpu: 2 threads, avx512', precisions: ['fp32'] },
  gpu: { device: 'cuda: NVIDIA A100', precisions: ['fp32', 'bf16'] },
  hopper: { device: 'cuda: NVIDIA H100', precisions: ['fp32', 'bf16', 'fp8'] },
}

function attach(fleet: Fleet, kind: keyof typeof devices): FleetWorker {
  const hello = { version, ...devices[kind] } as Hello__Output
  const worker = fleet.attach(hello, { send: () => {}, end: () => {} })
  fleet.announce(worker)
  return worker
}

function fleetOf(...kinds: (keyof typeof devices)[]): Fleet {
  const fleet = newFleet()
  for (const kind of kinds) attach(fleet, kind)
  return fleet
}

const fileWith = (keys: string) =>
  readJobFile({ text: `model: m\ndata: d\n${keys}`, fileName: 'job.yaml' })
const fileOf = (bf16: string) => fileWith(`bf16: ${bf16}`)

describe('the precision that a job computes in', () => {
  it('auto: bf16 where every worker has it, float32 as soon as one has not', () => {
    assert.equal(precisionAmong(fleetOf('gpu', 'gpu').workers, 'auto', true), 'bf16')
    assert.equal(precisionAmong(fleetOf('gpu', 'cpu').workers, 'auto', true), 'fp32')
    assert.equal(precisionAmong(fleetOf('cpu').workers, 'auto', false), 'fp32')
  })

  it('auto: waits while more workers are expected that may lack it', () => {
    assert.equal(precisionAmong(fleetOf('gpu').workers, 'auto', false), null)
    assert.equal(precisionAmong([], 'auto', true), null)
  })

  it('true: one worker is enough; none is refused by name, saying what to do', () => {
    assert.equal(precisionAmong(fleetOf('cpu', 'gpu').workers, 'bf16', false), 'bf16')
    assert.equal(precisionAmong(fleetOf('cpu').workers, 'bf16', false), null)
    const one = fleetOf('cpu')
    const message = new RegExp(`worker ${one.workers[0]?.id} computes on "cpu: 2.*tunemesh worker`)
    assert.throws(() => precisionAmong(one.workers, 'bf16', true), {
      code: 'JOB_INVALID',
      message,
    })
    const two = fleetOf('cpu', 'cpu').workers
    assert.throws(() => precisionAmong(two, 'bf16', true), { message: /none of 2 workers/ })
  })

  it('the second of two expected workers settles it when it attaches', async () => {
    for (const [second, expected] of [
      ['cpu', 'fp32'],
      ['gpu', 'bf16'],
    ] as const) {
      const fleet = fleetOf('gpu')
      const settling = settlePrecision(fleet, 'auto', { waitMs: 9e5, gatherMs: 9e5, wanted: 2 })
      attach(fleet, second)
      assert.equal(await settling, expected)
    }
  })

  it('where the second one never comes, those that are here settle it', async () => {
    const options = { waitMs: 9e5, gatherMs: 1, wanted: 2 }
    const running = setInterval(() => {}, 1_000) // the wait alone keeps no process alive
    assert.equal(await settlePrecision(fleetOf('gpu'), 'auto', options), 'bf16')
    clearInterval(running)
  })

  it('fp8: one Hopper GPU is enough; others are refused by name', () => {
    assert.equal(precisionAmong(fleetOf('cpu', 'hopper').workers, 'fp8', false), 'fp8')
    assert.equal(precisionAmong(fleetOf('gpu').workers, 'fp8', false), null)
    const message = /load_in_fp8: true needs a Hopper GPU.*computes on "cuda: NVIDIA A100".*Leave/
    assert.throws(() => precisionAmong(fleetOf('gpu').workers, 'fp8', true), {
      code: 'JOB_INVALID',
      message,
    })
  })

  it('a stop ends the wait', async () => {
    const stop = new AbortController()
    const options = { waitMs: 9e5, gatherMs: 9e5, wanted: 2, signal: stop.signal }
    const settling = settlePrecision(fleetOf('gpu'), 'auto', options)
    stop.abort()
    await assert.rejects(settling, { name: 'AbortError' })
  })
})

describe('a job file with bf16: true', () => {
  const mesh = (fleet: Fleet, options: { numWorkers: number; device: string }) =>
    ({ fleet, options }) as unknown as Mesh

  it('is refused at once by workers that lack it, with its place', () => {
    const attached = mesh(fleetOf('cpu'), { numWorkers: 0, device: 'auto' })
    const expected = { code: 'JOB_INVALID', message: /^job\.yaml:3 bf16: true needs a GPU/ }
    assert.throws(() => assertCanBegin(attached, fileOf('true'), 'job.yaml:3'), expected)
    const toCome = mesh(newFleet(), { numWorkers: 2, device: 'cpu' })
    assert.throws(() => assertCanBegin(toCome, fileOf('true'), 'job.yaml:3'), expected)
  })

  it('is taken where a worker has it or nothing is known; auto and false always are', () => {
    const unknown = mesh(newFleet(), { numWorkers: 1, device: 'auto' })
    assertCanBegin(unknown, fileOf('true'), 'job.yaml:3')
    const mixed = mesh(fleetOf('cpu', 'gpu'), { numWorkers: 0, device: 'auto' })
    assertCanBegin(mixed, fileOf('true'), 'job.yaml:3')
    const cpu = mesh(fleetOf('cpu'), { numWorkers: 0, device: 'cpu' })
    for (const value of ['auto', 'false']) assertCanBegin(cpu, fileOf(value), 'job.yaml:3')
  })
})

describe('a job file with optim: adamw_8bit', () => {
  const spec = fileWith('finetuning: full\noptim: adamw_8bit')

  it('asks for bf16, by its own place', () => {
    assert.equal(askedPrecision(spec), 'bf16')
    const places = new Map([['optim', 'job.yaml:4']])
    assert.equal(placeOfPrecision(spec, places), 'job.yaml:4')
    const cpu = {
      fleet: fleetOf('cpu'),
      options: { numWorkers: 0, device: 'auto' },
    } as unknown as Mesh
    assert.throws(() => assertCanBegin(cpu, spec, 'job.yaml:4'), {
      code: 'JOB_INVALID',
      message: /^job\.yaml:4 optim: adamw_8bit needs a GPU;.*Use optim: adamw, or attach/,
    })
  })

  it('is refused beside what it can not go with, by name', () => {
    const refused = (keys: string, message: RegExp) =>
      assert.throws(() => fileWith(`optim: adamw_8bit\n${keys}`), { code: 'JOB_INVALID', message })
    refused('finetuning: lora', /optim.*adamw_8bit is of full fine-tuning/)
    refused('finetuning: full\nbf16: false', /optim.*bf16 is false/)
    refused('finetuning: full\nfp32_master: true', /optim.*beside fp32_master/)
  })
})

describe('a job file with load_in_fp8: true', () => {
  const text = 'model: m\ndata: d\nload_in_fp8: true'
  const spec = readJobFile({ text, fileName: 'job.yaml' })
  const mesh = (fleet: Fleet) =>
    ({ fleet, options: { numWorkers: 0, device: 'auto' } }) as unknown as Mesh

  it('is refused at once by workers that lack it, with its place', () => {
    const places = new Map([['load_in_fp8', 'job.yaml:3']])
    assert.equal(placeOfPrecision(spec, places), 'job.yaml:3')
    assert.throws(() => assertCanBegin(mesh(fleetOf('cpu', 'gpu')), spec, 'job.yaml:3'), {
      code: 'JOB_INVALID',
      message: /^job\.yaml:3 load_in_fp8: true needs a Hopper GPU .* none of 2 workers has one/,
    })
  })

  it('is taken where a worker has it, and computes in fp8', () => {
    assertCanBegin(mesh(fleetOf('cpu', 'hopper')), spec, 'job.yaml:3')
    assert.equal(askedPrecision(spec), 'fp8')
  })

  it('is refused beside full fine-tuning and beside bf16: false', () => {
    const refused = (rest: string, message: RegExp) =>
      assert.throws(() => readJobFile({ text: `${text}\n${rest}`, fileName: 'job.yaml' }), {
        code: 'JOB_INVALID',
        message,
      })
    refused('finetuning: full', /load_in_fp8: true is of a frozen base/)
    refused('bf16: false', /load_in_fp8: true computes all else in bfloat16/)
  })
})

describe('what a device computes in', () => {
  it('follows from its description', () => {
    assert.deepEqual(precisionsOf('cpu: 2 threads, avx512'), ['fp32'])
    const card = (name: string, library: string) =>
      precisionsOf(`cuda: NVIDIA ${name}, cuBLASLt ${library}, driver CUDA 13.0`)
    assert.deepEqual(card('H100 80GB HBM3 (sm_90)', '13.0.2'), ['fp32', 'bf16', 'fp8'])
    assert.deepEqual(card('H200 (sm_90)', '12.9.1'), ['fp32', 'bf16', 'fp8'])
    assert.deepEqual(card('H200 (sm_90)', '12.8.4'), ['fp32', 'bf16'])
    assert.deepEqual(card('B200 (sm_100)', '13.0.2'), ['fp32', 'bf16'])
    assert.deepEqual(card('A100 (sm_80)', '13.0.2'), ['fp32', 'bf16'])
  })
})

describe('a worker for a job that began in bf16', () => {
  const job = { jobId: 'job-x' } as JobRecord
  const wait = { precision: 'bf16', waitMs: 9e5, gatherMs: 1 } as const

  it('is one that has it, also where another attached first', async () => {
    const mesh = { fleet: fleetOf('cpu', 'gpu'), options: { numWorkers: 0 } } as unknown as Mesh
    const { signal } = new AbortController()
    assert.match((await workerFor(mesh, job, { ...wait, signal })).hello.device, /^cuda/)
  })

  it('is waited for aloud where workers come by themselves', async () => {
    const told: string[] = []
    const fleet = fleetOf('cpu')
    const append = (_id: string, event: { log?: { message: string } }) => {
      told.push(event.log?.message ?? '')
      attach(fleet, 'gpu')
    }
    const mesh = { fleet, options: { numWorkers: 0 }, events: { append } } as unknown as Mesh
    const { signal } = new AbortController()
    assert.match((await workerFor(mesh, job, { ...wait, signal })).hello.device, /^cuda/)
    assert.match(told.join(), /began in bf16, in which no worker here can compute: w-\w+ on "cpu/)
  })

  it('ends a run whose own workers lack it', async () => {
    const mesh = { fleet: fleetOf('cpu'), options: { numWorkers: 1 } } as unknown as Mesh
    const { signal } = new AbortController()
    const expected = { code: 'NO_WORKERS', message: /Attach one with a GPU/ }
    await assert.rejects(workerFor(mesh, job, { ...wait, signal }), expected)
  })
})

describe('what trained weights and moments are kept in', () => {
  const statesIn = (precision: 'fp32' | 'bf16', keys: string) =>
    statesOf({ spec: fileWith(keys), precision } as SettledJob)

  it('bf16 for full training in bf16, float32 for adapters, in float32 and by fp32_master', () => {
    assert.equal(statesIn('bf16', 'finetuning: full'), 'bf16')
    assert.equal(statesIn('bf16', 'finetuning: full\nfp32_master: true'), 'fp32')
    assert.equal(statesIn('bf16', 'finetuning: lora'), 'fp32')
    assert.equal(statesIn('fp32', 'finetuning: full'), 'fp32')
    assert.equal(statesIn('bf16', 'finetuning: full\noptim: adamw_8bit'), 'bf16_8bit')
  })
})
