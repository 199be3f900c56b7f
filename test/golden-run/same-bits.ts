/**
 * `node build/test/golden-run/same-bits.js [--device cpu|cuda] [--workers 1,1,2,3] [--only WORD]
 *   [--steps N] [--json]`; in the bundle `./tunemesh dev same-bits …`
 *
 * Trains a Llama of a million elements in every method and precision that the device has, through
 * meshes of one worker, one again, two and three on that one device, and compares the SHA-256 of
 * the final weights: they must be equal. Exit 1 where any differ, or a worker had nothing to do.
 */
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { openMesh } from '../../bench/mesh/open-mesh.js'
import type { TunemeshClient } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'
import { tinyJob } from '../integration/open-coordinator.js'
import { readCommitLog } from '../integration/read-commit-log.js'
import { writeModel } from '../integration/same-bits-model.js'

const { values } = parseArgs({
  options: {
    device: { type: 'string', default: 'cpu' },
    workers: { type: 'string', default: '1,1,2,3' },
    only: { type: 'string', default: '' },
    steps: { type: 'string', default: '6' },
    json: { type: 'boolean', default: false },
  },
})
const device = values.device === 'cuda' ? 'cuda:0' : values.device
const microBatchesPerStep = 12

interface Kind {
  name: string
  /** A CPU computes in float32 alone, and fp8 needs Hopper: such a refusal is no failure. */
  needsGpu: boolean
  settings: Record<string, unknown>
}

const lora = { finetuning: 'lora', r: 16 }
const full = { finetuning: 'full' }
const kinds: Kind[] = [
  { name: 'lora fp32', needsGpu: false, settings: { ...lora, bf16: false } },
  { name: 'full fp32', needsGpu: false, settings: { ...full, bf16: false } },
  { name: 'lora bf16', needsGpu: true, settings: { ...lora, bf16: true } },
  { name: 'full bf16', needsGpu: true, settings: { ...full, bf16: true } },
  {
    name: 'full bf16, fp32 master',
    needsGpu: true,
    settings: { ...full, bf16: true, fp32_master: true },
  },
  {
    name: 'full bf16, 8-bit moments',
    needsGpu: true,
    settings: { ...full, optim: 'adamw_8bit' },
  },
  { name: 'lora fp8', needsGpu: true, settings: { ...lora, load_in_fp8: true } },
]

/** What one mesh came to: the digest, or why there is none. */
interface Trained {
  digest: string
  problem: string
  /** This device does not compute in that precision. */
  isSkipped: boolean
  seconds: number
}

async function train(
  {
    client,
    stateDir,
    numWorkers,
  }: { client: TunemeshClient; stateDir: string; numWorkers: number },
  { name, settings, needsGpu }: Kind,
): Promise<Trained> {
  const startedMs = performance.now()
  const failed = (state: string, told: { code: string; message: string } | null): Trained => ({
    digest: '',
    problem: `${state} ${told?.code ?? ''} ${told?.message ?? ''}`,
    isSkipped: needsGpu && told?.code === 'JOB_INVALID',
    seconds: (performance.now() - startedMs) / 1000,
  })
  const submitted = await client
    .submit(
      tinyJob(join(stateDir, 'output', name.replaceAll(/\W/g, '-')), {
        ...settings,
        model: join(folder, 'model'),
        max_steps: Number(values.steps),
        gradient_accumulation_steps: microBatchesPerStep,
        learning_rate: 1e-3,
        max_grad_norm: 0.1,
        save_steps: 0,
      }),
    )
    .catch((error: unknown) => {
      if (error instanceof TunemeshError && error.code === 'JOB_INVALID') return error
      throw error
    })
  if (submitted instanceof TunemeshError) return failed('refused', submitted)
  const { jobId } = submitted
  for await (const _ of client.watch(jobId));
  const { state, weightsSha256, error } = await client.get(jobId)
  if (state !== 'SUCCEEDED') return failed(state, error)
  const computed = new Set<string>()
  for (const { record } of await readCommitLog(stateDir, jobId))
    for (const { workerId, microBatches } of record.kind === 'commit' ? record.leases : [])
      if (microBatches.length > 0) computed.add(workerId)
  const isIdle = computed.size !== numWorkers
  const problem = isIdle ? `only ${computed.size} of ${numWorkers} workers computed` : ''
  const seconds = (performance.now() - startedMs) / 1000
  return { digest: weightsSha256, problem, isSkipped: false, seconds }
}

/** Every kind through one mesh of so many workers, one job after the other. */
async function trainAll(numWorkers: number, wanted: Kind[]): Promise<Trained[]> {
  const stateDir = mkdtempSync(join(tmpdir(), 'tunemesh-same-bits-'))
  const mesh = await openMesh({ stateDir, numWorkers, threadsPerWorker: 1, device })
  try {
    const trained: Trained[] = []
    for (const kind of wanted) {
      const done = await train({ client: mesh.client, stateDir, numWorkers }, kind)
      trained.push(done)
      console.error(
        `${numWorkers} worker${numWorkers > 1 ? 's' : ''}, ${kind.name}: ` +
          `${done.digest.slice(0, 16)} ${done.problem} (${done.seconds.toFixed(1)} s)`,
      )
    }
    return trained
  } finally {
    await mesh.close()
    rmSync(stateDir, { recursive: true, force: true })
  }
}

const folder = mkdtempSync(join(tmpdir(), 'tunemesh-same-bits-model-'))
process.once('exit', () => rmSync(folder, { recursive: true, force: true }))
writeModel(join(folder, 'model'))
const wanted = kinds.filter(({ name }) => name.includes(values.only))
const counts = values.workers.split(',').map(Number)
const meshes: Trained[][] = []
for (const count of counts) meshes.push(await trainAll(count, wanted))

console.log(
  `${'SHA-256 of the weights'.padEnd(26)}${counts.map((n) => `${n} of them`.padEnd(11)).join('')}`,
)
const numOf = { passed: 0, failed: 0, skipped: 0 }
for (const [index, { name }] of wanted.entries()) {
  const row = meshes.map((mesh) => mesh[index] as Trained)
  const problem = row.find((trained) => trained.problem !== '')?.problem ?? ''
  const isSame = problem === '' && new Set(row.map(({ digest }) => digest)).size === 1
  const isSkipped = row.every((trained) => trained.isSkipped)
  const outcome = isSame ? 'passed' : isSkipped ? 'skipped' : 'failed'
  ++numOf[outcome]
  const digests = row.map(({ digest }) => (digest.slice(0, 8) || '–').padEnd(11)).join('')
  const verdict = {
    passed: 'the same',
    skipped: `skipped: ${problem}`,
    failed: `FAILED ${problem}`,
  }
  if (values.json) console.log(JSON.stringify({ name, counts, row, outcome }))
  else console.log(`${name.padEnd(26)}${digests}${verdict[outcome]}`)
}
console.log(`${numOf.passed} passed, ${numOf.failed} failed, ${numOf.skipped} skipped`)
process.exit(numOf.failed === 0 ? 0 : 1)
