/**
 * `npm run golden -- DIR… [--device cpu|cuda] [--precision fp32|bf16|fp8] [--workers N] [--fetch]
 *   [--no-skips] [--json]`
 *
 * Runs folders in the format of test/golden/README.md against the engine and, for training, against
 * an embedded mesh. One line a check with the error reached; exit 1 if any fails. With fp8, which
 * a Hopper card alone has, LoRA's frozen base is fp8, and full fine-tuning is left out.
 */
import { spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync, statSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { basename, join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { type OpenMesh, openMesh } from '../../bench/mesh/open-mesh.js'
import type { TunemeshClient } from '../../client/client.js'
import type { Precision } from '../../proto/train-spec.js'
import { type Check, CheckList } from './checks.js'
import { checkEngine } from './engine-checks.js'
import { checkRealModel, isRealModelFolder } from './real-model-checks.js'
import { checkTokenizers } from './tokenizer-checks.js'
import { checkTraining, type GoldenMethod } from './training-checks.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'fp32' },
    workers: { type: 'string' },
    fetch: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
    /** What is skipped counts as failed. */
    'no-skips': { type: 'boolean', default: false },
  },
})

const device = values.device === 'cuda' ? 'cuda:0' : values.device
const precision: Precision =
  values.precision === 'bf16' || values.precision === 'fp8' ? values.precision : 'fp32'

/** One embedded mesh for each number of workers, started when first asked for. */
class Meshes {
  readonly #open = new Map<number, OpenMesh>()

  async client(numWorkers: number): Promise<TunemeshClient> {
    const known = this.#open.get(numWorkers)
    if (known) return known.client
    const stateDir = mkdtempSync(join(tmpdir(), 'tunemesh-golden-'))
    const mesh = await openMesh({ stateDir, numWorkers, threadsPerWorker: 1, device })
    this.#open.set(numWorkers, mesh)
    return mesh.client
  }

  async close(): Promise<void> {
    for (const mesh of this.#open.values()) {
      await mesh.close()
      rmSync(mesh.stateDir, { recursive: true, force: true })
    }
  }
}

const modelCache = join(
  process.env.XDG_CACHE_HOME || join(homedir(), '.cache'),
  'tunemesh',
  'models',
)

/** The real model's file: the demo's cache, filled by --fetch. */
function realModelFile(): string | null {
  const path = join(modelCache, 'SmolLM2-135M-Instruct.Q4_1.gguf')
  if (!existsSync(path) && values.fetch)
    spawnSync(process.execPath, ['scripts/model-setup.mjs'], { stdio: 'inherit' })
  return existsSync(path) ? path : null
}

async function runFolder(folder: string, meshes: Meshes, list: CheckList): Promise<void> {
  if (basename(folder) === 'tokenizers') return checkTokenizers(folder, list)
  if (isRealModelFolder(folder)) {
    if (precision !== 'fp32') return list.skipped('the real model', 'its limits are those of fp32')
    const gguf = realModelFile()
    if (gguf === null)
      return list.skipped('the real model', 'its 98 MB are not in the cache; --fetch gets them')
    const client = (numWorkers: number) => meshes.client(numWorkers)
    return checkRealModel({ folder, gguf, device, client }, list)
  }
  await checkEngine({ folder, device, precision }, list)
  const counts = values.workers ? [Number(values.workers)] : [1, 2]
  const methods: GoldenMethod[] = [{ finetuning: 'lora' }]
  if (precision !== 'fp8') methods.unshift({ finetuning: 'full' })
  if (precision === 'bf16') methods.push({ finetuning: 'full', fp32Master: true })
  for (const method of methods)
    for (const numWorkers of counts)
      await checkTraining(
        await meshes.client(numWorkers),
        { folder, ...method, numWorkers, precision },
        list,
      )
}

function printCheck(check: Check): void {
  if (values.json) return console.log(JSON.stringify(check))
  const error = Number.isNaN(check.error)
    ? ''
    : `${check.error.toExponential(1)} (limit ${check.limit})`
  const where = `${check.folder.padEnd(18)} ${check.name.padEnd(44)}`
  console.log(`${check.outcome.padEnd(7)} ${where} ${error} ${check.note}`.trimEnd())
}

function foldersGiven(): string[] {
  if (positionals.length === 0) {
    console.error('Which folders? For example: npm run golden -- test/golden/*/')
    process.exit(2)
  }
  if (!/^(cpu|cuda(:\d+)?)$/.test(values.device)) {
    console.error(`--device is "${values.device}"; use cpu, cuda, or cuda:1 and so on.`)
    process.exit(2)
  }
  if (!/^(fp32|bf16|fp8)$/.test(values.precision)) {
    console.error(`--precision is "${values.precision}"; use fp32, bf16 or fp8.`)
    process.exit(2)
  }
  const folders = positionals.map((path) => resolve(path))
  const missing = folders.filter((path) => !existsSync(path) || !statSync(path).isDirectory())
  if (missing.length > 0) {
    console.error(`No such folder: ${missing.join(', ')}`)
    process.exit(2)
  }
  return folders
}

const folders = foldersGiven()
const meshes = new Meshes()
const checks: Check[] = []
try {
  for (const folder of folders) {
    const list = new CheckList(basename(folder), (check) => {
      checks.push(check)
      printCheck(check)
    })
    try {
      await runFolder(folder, meshes, list)
    } catch (error) {
      list.failed('run', error instanceof Error ? (error.stack ?? error.message) : String(error))
    }
  }
} finally {
  await meshes.close()
}
const count = (outcome: Check['outcome']) =>
  checks.filter((check) => check.outcome === outcome).length
console.log(`${count('ok')} passed, ${count('FAILED')} failed, ${count('skipped')} skipped`)
const isSkipBad = values['no-skips'] && count('skipped') > 0
process.exit(count('FAILED') > 0 || isSkipBad ? 1 : 0)
