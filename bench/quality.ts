/**
 * `npm run bench -- quality --gsm8k FOLDER [--drug-names FOLDER]`; in the bundle `./tunemesh dev
 * bench quality …`: whether bf16 and fp8 learn as fp32 does. SmolLM2-135M-Instruct, LoRA, 300
 * steps on each set of rows, each precision and each seed, through an embedded mesh of one worker:
 * mean loss of the last 50 steps and loss on held-out rows, with the spread between the seeds.
 *
 *   --model PATH           a .gguf file or Hugging Face folder (default: the demo's, in the cache)
 *   --precisions LIST      of fp32, bf16, fp8 (fp32,bf16)       --seeds LIST (1,2,3)
 *   --steps N (300)        --last N (50): steps whose loss counts
 *   --batch N              packs of a step (8 of GSM8K, 1 of the demo's rows)
 *   --max-length N         tokens of a pack (512 and 224)
 *   --held-out N (128)     rows               --learning-rate X (2e-4)
 *   --time-limit SECONDS   starts no training that would not end in it
 *   --out FILE             a JSON object a line; what it has is not trained again
 *   --jobs N (1)           so many trainings at once, each on a mesh of its own: the same numbers
 *   --device cuda:0, --threads N     to each worker
 *   --json                 the rows and nothing else
 */
import { spawnSync } from 'node:child_process'
import { appendFileSync, existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import type { TunemeshClient } from '../client/client.js'
import { type OpenMesh, openMesh } from './mesh/open-mesh.js'
import {
  type Comparison,
  compare,
  isWithin,
  keyOf,
  limitPercent,
  type Precision,
  type QualityRow,
  type RunKey,
} from './quality/comparison.js'
import { type RowSet, writeRowSets } from './quality/row-sets.js'
import { train } from './quality/training.js'
import { type Column, tableLine } from './rows/table.js'

const top = fileURLToPath(new URL('../../', import.meta.url))
const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')
const text = { type: 'string' } as const
const { values } = parseArgs({
  options: {
    model: {
      type: 'string',
      default: join(cacheDir, 'models', 'SmolLM2-135M-Instruct.Q4_1.gguf'),
    },
    gsm8k: text,
    'drug-names': text,
    precisions: { type: 'string', default: 'fp32,bf16' },
    seeds: { type: 'string', default: '1,2,3' },
    steps: { type: 'string', default: '300' },
    last: { type: 'string', default: '50' },
    batch: text,
    'max-length': text,
    'held-out': { type: 'string', default: '128' },
    'learning-rate': { type: 'string', default: '2e-4' },
    'time-limit': text,
    jobs: { type: 'string', default: '1' },
    out: { type: 'string', default: join(top, 'build/bench-quality.jsonl') },
    device: { type: 'string', default: 'auto' },
    threads: { type: 'string', default: '0' },
    json: { type: 'boolean', default: false },
  },
})

function countOf(name: 'steps' | 'last' | 'batch' | 'max-length' | 'held-out' | 'jobs'): number {
  const value = Number(values[name])
  if (Number.isInteger(value) && value >= 1) return value
  throw new RangeError(`--${name} is ${values[name]}; use a whole number from 1 on.`)
}

/** Seeds outermost: a file that is cut off has whole comparisons. */
function runsOf(sets: RowSet[]): RunKey[] {
  const precisions = values.precisions.split(',')
  const unknown = precisions.find((name) => !['fp32', 'bf16', 'fp8'].includes(name))
  if (unknown !== undefined)
    throw new RangeError(`--precisions has "${unknown}"; use fp32, bf16 and fp8.`)
  const common = {
    model: resolve(values.model),
    steps: countOf('steps'),
    learning_rate: Number(values['learning-rate']),
    held_out_rows: countOf('held-out'),
    last_steps: Math.min(countOf('last'), countOf('steps')),
  }
  const seeds = values.seeds.split(',').map(Number)
  return seeds.flatMap((seed) =>
    sets.flatMap(({ name: data, ...set }) => {
      const batch = values.batch === undefined ? set.batch : countOf('batch')
      const long = values['max-length'] === undefined ? set.maxLength : countOf('max-length')
      const sizes = { batch, max_length: long }
      return (precisions as Precision[]).map((precision) => ({
        ...{ data, precision, seed },
        ...common,
        ...sizes,
      }))
    }),
  )
}

function rowsOfFile(): QualityRow[] {
  if (!existsSync(values.out)) return []
  const lines = readFileSync(values.out, 'utf8').split('\n')
  return lines.filter((line) => line !== '').map((line) => JSON.parse(line) as QualityRow)
}

/** The bundle carries the commit in a file. */
function commit(): string | null {
  const carried = join(top, 'build/commit.txt')
  if (existsSync(carried)) return readFileSync(carried, 'utf8').trim()
  const done = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: top, encoding: 'utf8' })
  return done.status === 0 ? done.stdout.trim() : null
}

async function deviceOf(client: TunemeshClient): Promise<string> {
  const workers = await client.listWorkers()
  return workers[0]?.device ?? 'unknown'
}

async function runOne(client: TunemeshClient, key: RunKey, rows: RowSet): Promise<QualityRow> {
  const start = performance.now()
  const losses = await train(client, { key, rows, workDir })
  const last = losses.steps.slice(-key.last_steps)
  return {
    ...key,
    last_loss: last.reduce((sum, loss) => sum + loss, 0) / last.length,
    held_out_before: losses.heldOutBefore,
    held_out_loss: losses.heldOutAfter,
    seconds: (performance.now() - start) / 1e3,
    device: await deviceOf(client),
    date: new Date().toISOString(),
    commit: commit(),
  }
}

/** What several meshes train from, each the next one; the order is that of the runs. */
class Queue {
  numFailed = 0
  readonly #missing: RunKey[]
  readonly #longestMs = new Map<Precision, number>()
  readonly #endMs = performance.now() + 1e3 * Number(values['time-limit'] ?? Infinity)

  constructor(private readonly sets: RowSet[]) {
    const known = new Set(rowsOfFile().map(keyOf))
    this.#missing = runsOf(sets).filter((key) => !known.has(keyOf(key)))
  }

  async trainOn(client: TunemeshClient): Promise<void> {
    for (let key = this.#missing.shift(); key !== undefined; key = this.#missing.shift()) {
      const title = `${key.data} ${key.precision} seed ${key.seed}`
      if (performance.now() + (this.#longestMs.get(key.precision) ?? 0) > this.#endMs) {
        say(`${title}: no time left; the same command goes on with it`)
        continue
      }
      const rows = this.sets.find(({ name }) => name === key.data)
      if (rows !== undefined) await this.#trainOne(client, { key, rows, title })
    }
  }

  async #trainOne(
    client: TunemeshClient,
    { key, rows, title }: { key: RunKey; rows: RowSet; title: string },
  ): Promise<void> {
    try {
      const row = await runOne(client, key, rows)
      const longestMs = this.#longestMs.get(key.precision) ?? 0
      this.#longestMs.set(key.precision, Math.max(1e3 * row.seconds, longestMs))
      appendFileSync(values.out, `${JSON.stringify(row)}\n`)
      if (values.json) console.log(JSON.stringify(row))
      say(`${title}: last ${row.last_loss.toFixed(4)}, held out ${heldOut(row)}, ${took(row)}`)
    } catch (error) {
      this.numFailed += 1
      console.error(`${title}: ${(error as Error).message}`)
    }
  }
}

const heldOut = (row: QualityRow) =>
  `${row.held_out_before.toFixed(4)} → ${row.held_out_loss.toFixed(4)}`
const took = ({ seconds, device }: QualityRow) => `${seconds.toFixed(1)} s on ${device}`
const say = (line: string) => {
  if (!values.json) console.log(line)
}

const percent = (value: number | null) =>
  value === null ? '–' : `${value >= 0 ? '+' : ''}${value.toFixed(3)} %`
const columns: Column<Comparison>[] = [
  { title: 'rows', width: -11, text: ({ data }) => data },
  {
    title: 'loss',
    width: -10,
    text: ({ loss }) => (loss === 'last_loss' ? 'last steps' : 'held out'),
  },
  { title: 'precision', width: -9, text: ({ precision }) => precision },
  { title: 'seeds', width: 5, text: ({ seeds }) => String(seeds) },
  { title: 'mean', width: 8, text: ({ mean }) => mean.toFixed(5) },
  { title: 'spread', width: 8, text: ({ spread }) => spread.toFixed(5) },
  { title: 'against', width: 7, text: ({ against }) => against ?? '–' },
  { title: 'differs', width: 10, text: (row) => percent(row.differencePercent) },
  { title: 'most', width: 10, text: (row) => percent(row.mostPercent) },
  {
    title: `≤ ${limitPercent} %`,
    width: 7,
    text: (row) => ({ true: 'yes', false: 'NO', null: '–' })[`${isWithin(row)}`],
  },
]

/** Of the runs asked for, those that the file has. */
function report(sets: RowSet[]): boolean {
  const wanted = new Set(runsOf(sets).map(keyOf))
  const comparisons = compare(rowsOfFile().filter((row) => wanted.has(keyOf(row))))
  say(`\n${tableLine(columns, ({ title }) => title)}`)
  for (const row of comparisons) say(tableLine(columns, (column) => column.text(row)))
  say(`\nrows are in ${values.out}`)
  return comparisons.every((row) => isWithin(row) !== false)
}

async function main(): Promise<number> {
  if (!existsSync(values.model))
    throw new RangeError(
      `${values.model} is not there: give --model, or node scripts/model-setup.mjs`,
    )
  const heldOutRows = countOf('held-out')
  const sources = { gsm8k: values.gsm8k, drugNames: values['drug-names'], heldOutRows }
  const sets = await writeRowSets(sources, workDir)
  runsOf(sets)
  const numMeshes = countOf('jobs')
  const starts = Array.from({ length: numMeshes }, (_, index) => meshOfOne(index))
  const meshes = await allOrNone(starts)
  // Cut off, it leaves no process and no temporary file; the rows that it has stand in the file.
  for (const signal of ['SIGINT', 'SIGTERM'] as const)
    process.once(signal, () => {
      void Promise.all(meshes.map((mesh) => mesh.close())).finally(() => {
        rmSync(workDir, { recursive: true, force: true })
        process.exit(130)
      })
    })
  try {
    const queue = new Queue(sets)
    await Promise.all(meshes.map(({ client }) => queue.trainOn(client)))
    const isGood = report(sets)
    return queue.numFailed === 0 && isGood ? 0 : 1
  } finally {
    await Promise.all(meshes.map((mesh) => mesh.close()))
  }
}

const meshOfOne = (index: number): Promise<OpenMesh> =>
  openMesh({
    stateDir: join(workDir, `state-${index}`),
    numWorkers: 1,
    threadsPerWorker: Number(values.threads),
    device: values.device,
  })

/** One that can not start ends those that did. */
async function allOrNone(starts: Promise<OpenMesh>[]): Promise<OpenMesh[]> {
  const settled = await Promise.allSettled(starts)
  const meshes = settled.flatMap((it) => (it.status === 'fulfilled' ? [it.value] : []))
  const failed = settled.find((it) => it.status === 'rejected')
  if (failed === undefined) return meshes
  await Promise.all(meshes.map((mesh) => mesh.close()))
  throw failed.reason
}

const workDir = mkdtempSync(join(tmpdir(), 'tunemesh-quality-'))
try {
  process.exitCode = await main()
} catch (error) {
  if (!(error instanceof RangeError)) throw error
  console.error(error.message)
  process.exitCode = 2
} finally {
  rmSync(workDir, { recursive: true, force: true })
}
