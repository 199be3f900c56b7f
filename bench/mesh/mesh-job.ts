/** Jobs on an embedded mesh of their own, for benchmarks; all they write is gone afterwards. */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join } from 'node:path'
import type { JobEvent, TunemeshClient } from '../../client/client.js'
import { openMesh } from './open-mesh.js'

export const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')
export const demoModel = join(cacheDir, 'models', 'SmolLM2-135M-Instruct.Q4_1.gguf')

export interface MeshJob {
  numWorkers: number
  model: string
  numRows: number
  tokensPerPack: number
  /** Of the workers; by default "cpu". */
  device?: string
  /** Further lines of the job file. */
  settings: string[]
}

export interface MeshObserver {
  started?(client: TunemeshClient): void
  event(event: JobEvent): void
  /** The job has ended, the mesh still stands. */
  ended?(client: TunemeshClient): Promise<void>
}

/** Every worker has one thread. */
export async function runMeshJob(job: MeshJob, observer: MeshObserver): Promise<void> {
  const workDir = mkdtempSync(join(tmpdir(), 'tunemesh-bench-'))
  const mesh = await openMesh({
    stateDir: join(workDir, 'state'),
    numWorkers: job.numWorkers,
    threadsPerWorker: 1,
    device: job.device ?? 'cpu',
  })
  const { client } = mesh
  try {
    writeTextRows(join(workDir, 'rows.jsonl'), job)
    const jobFile = [
      `model: ${job.model}`,
      'data: rows.jsonl',
      `output_dir: ${join(workDir, 'output')}`,
      `max_length: ${job.tokensPerPack}`,
      'on_long_row: truncate',
      ...job.settings,
    ].join('\n')
    observer.started?.(client)
    const { jobId } = await client.submit({ jobFile, jobFileName: 'job.yaml', baseDir: workDir })
    for await (const event of client.watch(jobId)) observer.event(event)
    const { state, error } = await client.get(jobId)
    if (state !== 'SUCCEEDED') throw new Error(`the job is ${state}: ${error?.message ?? ''}`)
    await observer.ended?.(client)
  } finally {
    await mesh.close()
    rmSync(workDir, { recursive: true, force: true })
  }
}

/** Rows of words that each fill one pack to its last token; no two begin alike. */
function writeTextRows(path: string, { numRows, tokensPerPack }: MeshJob): void {
  const rows = Array.from({ length: numRows }, (_, row) =>
    JSON.stringify({
      text: Array.from(
        { length: tokensPerPack },
        (_, i) => words[(row * 37 + i * (row + 1)) % words.length],
      ).join(' '),
    }),
  )
  writeFileSync(path, `${rows.join('\n')}\n`)
}

const words =
  'a of the river stone carries warm light over green hills while small birds sing near old walls'
    .concat(' and every morning someone walks slowly down toward the harbour to count white boats')
    .split(' ')

/** Ends the program where the demo's model is not there. */
export function requireDemoModel(): void {
  if (existsSync(demoModel)) return
  console.error(
    `MODEL_NOT_FOUND ${demoModel} is not there: node scripts/model-setup.mjs fetches it.`,
  )
  process.exit(2)
}
