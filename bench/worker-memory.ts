/**
 * `npm run bench -- worker-memory [--steps N] [--only TEXT] [--json]`: resident memory of a worker
 * beside its plan, sampled from /proc/PID/smaps every 50 ms of a job's life.
 *
 *   plan      what the engine said it would reserve
 *   peak      most resident pages without those of the shared packed model; what they belong to
 *   over      peak beyond the plan: at most 150 MB
 *   after     the same pages when the job has ended and the worker waits for the next one
 *
 * 135M: SmolLM2-135M, LoRA r=16 on all linears, micro-batches of 2 x 256 tokens. 5M: all weights
 * of a small Llama, 8 x 256.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import type { JobEvent, TunemeshClient } from '../client/client.js'
import { demoModel, requireDemoModel, runMeshJob } from './mesh/mesh-job.js'
import { type Column, tableLine } from './rows/table.js'
import { type Resident, residentOf } from './worker-memory/resident.js'
import { writeSmallModel } from './worker-memory/small-model.js'

const { values } = parseArgs({
  options: {
    steps: { type: 'string', default: '4' },
    only: { type: 'string', default: '' },
    json: { type: 'boolean', default: false },
  },
})

const sampleEveryMs = 50
/** A worker answers the release of a job at once; V8 may take its time. */
const settleMs = 3_000
const mb = (bytes: number) => (bytes / 1e6).toFixed(0)

interface Work {
  name: string
  model: string
  settings: string[]
}

interface Row {
  work: string
  workers: number
  worker: string
  plan_bytes: number
  peak_bytes: number
  over_bytes: number
  peak_anonymous_bytes: number
  peak_program_bytes: number
  peak_model_file_bytes: number
  shared_model_bytes: number
  after_bytes: number
}

/** Samples every worker of a mesh, by process id. */
class Sampler {
  readonly peaks = new Map<number, Resident>()
  readonly shared = new Map<number, number>()
  #timer: NodeJS.Timeout | null = null
  #client: TunemeshClient | null = null

  start(client: TunemeshClient): void {
    this.#client = client
    this.#timer = setInterval(() => void this.sample(), sampleEveryMs)
  }

  stop(): void {
    if (this.#timer) clearInterval(this.#timer)
    this.#timer = null
  }

  async sample(): Promise<Map<number, Resident>> {
    const found = new Map<number, Resident>()
    const workers = (await this.#client?.listWorkers().catch(() => [])) ?? []
    for (const { processId } of workers) {
      const now = residentOf(processId)
      if (now === null) continue
      found.set(processId, now)
      if (now.ownBytes > (this.peaks.get(processId)?.ownBytes ?? 0)) {
        this.peaks.set(processId, now)
      }
      const shared = Math.max(this.shared.get(processId) ?? 0, now.sharedModelBytes)
      this.shared.set(processId, shared)
    }
    return found
  }
}

async function measure(work: Work, numWorkers: number): Promise<Row[]> {
  const sampler = new Sampler()
  let planBytes = 0
  let after = new Map<number, Resident>()
  await runMeshJob(
    { ...work, numWorkers, numRows: 64, tokensPerPack: 256 },
    {
      started: (client) => sampler.start(client),
      event: ({ plan }: JobEvent) => {
        if (plan) planBytes = plan.memory?.totalBytes ?? 0
      },
      ended: async () => {
        await delay(settleMs)
        sampler.stop()
        after = await sampler.sample()
      },
    },
  ).finally(() => sampler.stop())
  return [...sampler.peaks].map(([processId, peak], index) => ({
    work: work.name,
    workers: numWorkers,
    worker: `${index + 1}`,
    plan_bytes: planBytes,
    peak_bytes: peak.ownBytes,
    over_bytes: peak.ownBytes - planBytes,
    peak_anonymous_bytes: peak.anonymousBytes,
    peak_program_bytes: peak.programBytes,
    peak_model_file_bytes: peak.modelFileBytes,
    shared_model_bytes: sampler.shared.get(processId) ?? 0,
    after_bytes: after.get(processId)?.ownBytes ?? 0,
  }))
}

const columns: Column<Row>[] = [
  { title: 'work', width: -20, text: (row) => row.work },
  { title: 'worker', width: 7, text: (row) => `${row.worker} of ${row.workers}` },
  { title: 'plan', width: 7, text: (row) => mb(row.plan_bytes) },
  { title: 'peak', width: 7, text: (row) => mb(row.peak_bytes) },
  { title: 'over', width: 7, text: (row) => mb(row.over_bytes) },
  { title: 'anonymous', width: 10, text: (row) => mb(row.peak_anonymous_bytes) },
  { title: 'program', width: 8, text: (row) => mb(row.peak_program_bytes) },
  { title: 'model file', width: 11, text: (row) => mb(row.peak_model_file_bytes) },
  { title: 'shared', width: 7, text: (row) => mb(row.shared_model_bytes) },
  { title: 'after', width: 7, text: (row) => mb(row.after_bytes) },
]

function print(row: Row): void {
  if (values.json) console.log(JSON.stringify(row))
  else console.log(tableLine(columns, (column) => column.text(row)))
}

requireDemoModel()
const folder = mkdtempSync(join(tmpdir(), 'tunemesh-small-'))
writeSmallModel(folder)
const steps = [`max_steps: ${values.steps}`, 'gradient_accumulation_steps: 4', 'save_steps: 0']
const works: Work[] = [
  {
    name: '135M LoRA 2x256',
    model: demoModel,
    settings: [...steps, 'per_device_train_batch_size: 2'],
  },
  {
    name: '5M full 8x256',
    model: folder,
    settings: [...steps, 'finetuning: full', 'per_device_train_batch_size: 8'],
  },
]
if (!values.json) {
  console.log('MB (10^6 bytes); one thread a worker')
  console.log(tableLine(columns, ({ title }) => title))
}
try {
  for (const work of works.filter(({ name }) => name.includes(values.only))) {
    for (const numWorkers of [1, 2]) for (const row of await measure(work, numWorkers)) print(row)
  }
} finally {
  rmSync(folder, { recursive: true, force: true })
}
