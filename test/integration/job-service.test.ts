import assert from 'node:assert/strict'
import { once } from 'node:events'
import { existsSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import type { Job, JobEvent, TunemeshClient } from '../../client/client.js'
import { launch, TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'

const outputs = temporaryFolder()
let numOutputs = 0
const newOutput = () => join(outputs, `output-${++numOutputs}`)

async function watchToEnd(client: TunemeshClient, job: Job): Promise<JobEvent[]> {
  const events: JobEvent[] = []
  for await (const event of client.watch(job.jobId)) events.push(event)
  return events
}

const sequencesOf = (events: JobEvent[]) => events.map((event) => event.sequence)
const from1 = (length: number) => Array.from({ length }, (_, index) => index + 1)
const stepsOf = (events: JobEvent[]) => events.flatMap((event) => event.step?.step ?? [])
const statesOf = (events: JobEvent[]) => events.flatMap((event) => event.stateChanged?.state ?? [])

/** Weights of the tiny job after an undisturbed run: what every disturbed one must end with. */
let undisturbed = ''

describe('a job', () => {
  after(() => rmSync(outputs, { recursive: true, force: true }))

  it('trains on one worker, watched without a gap, and leaves adapter and run record', async () => {
    const coordinator = await TestCoordinator.open({ workers: 1 })
    const { client } = coordinator
    const output = newOutput()
    const submitted = await client.submit(tinyJob(output))
    assert.equal(submitted.state, 'VALIDATING')
    const events = await watchToEnd(client, submitted)
    assert.deepEqual(sequencesOf(events), from1(events.length))
    assert.deepEqual(stepsOf(events), from1(12))
    assert.deepEqual(statesOf(events), ['VALIDATING', 'QUEUED', 'RUNNING', 'SUCCEEDED'])
    const job = await client.get(submitted.jobId)
    assert.equal(job.state, 'SUCCEEDED')
    assert.equal(job.step, 12)
    assert.match(job.weightsSha256, /^[0-9a-f]{64}$/)
    undisturbed = job.weightsSha256
    assert.ok(existsSync(join(output, 'adapter_model.safetensors')))
    const record = JSON.parse(readFileSync(join(output, 'run.json'), 'utf8'))
    assert.equal(record.weightsSha256, undisturbed)
    assert.equal(record.steps.length, 12)
    assert.deepEqual(await client.stop(job.jobId), job)
    await assert.rejects(client.resume(job.jobId), { code: 'STATE_CONFLICT' })
    await coordinator.close()
    coordinator.removeState()
  })

  it('ends with the same weights on three workers, each of which has its share', async () => {
    const coordinator = await TestCoordinator.open({ workers: 3 })
    const job = await coordinator.client.submit(tinyJob(newOutput()))
    const events = await watchToEnd(coordinator.client, job)
    const sharing = events.flatMap((event) => event.step?.shares ?? [])
    assert.equal(new Set(sharing.map((share) => share.workerId)).size, 3)
    assert.equal((await coordinator.client.get(job.jobId)).weightsSha256, undisturbed)
    await coordinator.close()
    coordinator.removeState()
  })

  it('goes on after kill -9 of the coordinator with JetStream and blobs alone', async () => {
    const tuning = { failpoints: 'coordinator.after-append-commit:6' }
    const first = await TestCoordinator.open({ workers: 2, tuning })
    const job = await first.client.submit(tinyJob(newOutput()))
    await first.ended()
    for (const name of readdirSync(first.stateDir)) {
      const isKept = name === 'jetstream' || name === 'blobs'
      if (!isKept) rmSync(join(first.stateDir, name), { recursive: true })
    }
    const second = await TestCoordinator.open({ workers: 2, stateDir: first.stateDir })
    const events = await watchToEnd(second.client, job)
    assert.deepEqual(sequencesOf(events), from1(events.length))
    const ended = await second.client.get(job.jobId)
    assert.equal(ended.state, 'SUCCEEDED')
    assert.equal(ended.weightsSha256, undisturbed)
    await second.close()
    second.removeState()
  })

  it('stops with a checkpoint and resumes to the same weights', async () => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    const { client } = coordinator
    const job = await client.submit(tinyJob(newOutput()))
    for await (const event of client.watch(job.jobId)) {
      if (event.step?.step === 3) break
    }
    await client.stop(job.jobId)
    const events = await watchToEnd(client, job)
    assert.equal(statesOf(events).at(-1), 'STOPPED')
    const checkpoint = events.filter((event) => event.checkpoint).at(-1)?.checkpoint
    assert.equal(checkpoint?.step, stepsOf(events).at(-1))
    await client.resume(job.jobId)
    const again = await watchToEnd(client, job)
    assert.equal(statesOf(again).at(-1), 'SUCCEEDED')
    assert.deepEqual(stepsOf(again), from1(12))
    assert.equal((await client.get(job.jobId)).weightsSha256, undisturbed)
    await coordinator.close()
    coordinator.removeState()
  })

  it('survives kill -9 of nats-server and of a worker', async () => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    const { client } = coordinator
    const job = await client.submit(tinyJob(newOutput(), { max_steps: 40 }))
    for await (const event of client.watch(job.jobId)) {
      const step = event.step?.step ?? 0
      if (step === 3) {
        const [worker] = await client.listWorkers()
        process.kill(worker?.processId ?? -1, 'SIGKILL')
      }
      if (step === 20) {
        for (const pid of childrenNamed('nats-server', coordinator.ready.pid)) {
          process.kill(pid, 'SIGKILL')
        }
      }
    }
    const ended = await client.get(job.jobId)
    assert.deepEqual([ended.state, ended.error], ['SUCCEEDED', null])
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('submit', () => {
  it('makes one job of any number of sendings under one key', async () => {
    const coordinator = await TestCoordinator.open()
    const request = { ...tinyJob(newOutput()), idempotencyKey: 'once' }
    const jobs = await Promise.all(from1(20).map(() => coordinator.client.submit(request)))
    assert.equal(new Set(jobs.map((job) => job.jobId)).size, 1)
    assert.equal((await coordinator.client.list()).length, 1)
    await coordinator.close()
    const second = await TestCoordinator.open({ stateDir: coordinator.stateDir })
    assert.equal((await second.client.submit(request)).jobId, jobs[0]?.jobId)
    await second.close()
    second.removeState()
  })

  it('answers with every problem of a job file and makes no job', async () => {
    const coordinator = await TestCoordinator.open()
    const jobFile = 'modell: x\ndata: rows.jsonl\nr: many\n'
    await assert.rejects(
      coordinator.client.submit({ jobFile, jobFileName: 'job.yaml', baseDir: '/' }),
      (error: { code: string; details: string[] }) => {
        assert.equal(error.code, 'JOB_INVALID')
        assert.match(error.details.join('\n'), /job\.yaml:3 r: "many"/)
        return true
      },
    )
    assert.deepEqual(await coordinator.client.list(), [])
    await coordinator.close()
    coordinator.removeState()
  })

  it('refuses an output folder that another job will write', async () => {
    const coordinator = await TestCoordinator.open()
    const output = newOutput()
    await coordinator.client.submit(tinyJob(output))
    await assert.rejects(coordinator.client.submit(tinyJob(output)), { code: 'OUTPUT_IN_USE' })
    await coordinator.close()
    coordinator.removeState()
  })
})

describe('the coordinator process', () => {
  it('refuses a state folder in use, and takes over one whose owner was killed', async () => {
    const first = await TestCoordinator.open()
    const { child, ready } = await launch(first.stateDir, {})
    assert.equal(ready.error?.code, 'STATE_IN_USE')
    await once(child, 'exit')
    await first.kill()
    const second = await TestCoordinator.open({ stateDir: first.stateDir })
    assert.equal(second.ready.token, first.ready.token)
    await second.close()
    assert.equal(existsSync(join(second.stateDir, 'endpoint.json')), false)
    second.removeState()
  })

  it('leaves no process behind when it is killed', async () => {
    const coordinator = await TestCoordinator.open({ workers: 2 })
    const servers = childrenNamed('nats-server', coordinator.ready.pid)
    const workers = await attached(coordinator.client, 2)
    const pids = [...servers, ...workers.map((worker) => worker.processId)]
    assert.equal(pids.length, 3)
    await coordinator.kill()
    await Promise.all(pids.map(goneOf))
    coordinator.removeState()
  })
})

async function attached(client: TunemeshClient, count: number) {
  for (;;) {
    const workers = await client.listWorkers()
    if (workers.length === count) return workers
  }
}

/** Processes of a name below one of ours. */
function childrenNamed(name: string, root: number): number[] {
  const found: number[] = []
  const visit = (pid: number) => {
    const children = readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').trim()
    for (const child of children === '' ? [] : children.split(' ').map(Number)) {
      if (readFileSync(`/proc/${child}/comm`, 'utf8').startsWith(name)) found.push(child)
      visit(child)
    }
  }
  visit(root)
  return found
}

/** Resolves when the process is gone; a zombie that nobody reaps counts as gone. */
async function goneOf(pid: number): Promise<void> {
  while (existsSync(`/proc/${pid}/stat`)) {
    if (/\) Z /.test(readFileSync(`/proc/${pid}/stat`, 'utf8'))) return
    await new Promise((resolve) => setImmediate(resolve))
  }
}
