/**
 * `npm run product`; in the bundle `./tunemesh dev product`: the whole product on this machine as a
 * user runs it, by the command line alone. A table with what each part showed; exit 1 if one fails.
 *
 *   --device cpu|cuda:0   of the workers (auto: as `doctor` lists)
 *   --python PATH         with torch, transformers and peft (python3); without them that part skips
 *   --model FILE          a .gguf file or Hugging Face folder that answers, is trained whole for a
 *                         step, and the whole model is tuned and answers again
 *   --data FILE           its rows (those of examples/tiny-llama)
 *   --steps N             of tuning it (30)
 *   --keep DIR            where jobs, results and logs stay (by default they are deleted)
 *   --no-skips            a part that is skipped fails
 */
import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { CliProcess, jsonLines } from '../integration/cli-process.js'
import { projectDir } from '../integration/temporary-mesh.js'
import { PageClient } from './page-client.js'

const { values } = parseArgs({
  options: {
    device: { type: 'string', default: 'auto' },
    python: { type: 'string', default: 'python3' },
    model: { type: 'string' },
    data: { type: 'string' },
    steps: { type: 'string', default: '30' },
    keep: { type: 'string' },
    'no-skips': { type: 'boolean', default: false },
  },
})
const top = projectDir()
const example = join(top, 'examples/tiny-llama')
const jobFile = join(example, 'job.yaml')
const folder = values.keep ? resolve(values.keep) : mkdtempSync(join(tmpdir(), 'tunemesh-product-'))
mkdirSync(folder, { recursive: true })
const stateDir = join(folder, 'state')
const onDevice = ['--device', values.device]

type Outcome = 'ok' | 'FAILED' | 'skipped'
class Skip extends Error {}
const parts: { name: string; outcome: Outcome; seconds: number; note: string }[] = []

/** What an earlier part made and later ones need. */
const made = { dashboard: '', jobId: '', weights: '', device: '' }
const opened: { up?: CliProcess; verb?: CliProcess; page?: PageClient } = {}
/** Asked to end: what runs is ended, nothing more is started. */
let isCutOff = false
for (const signal of ['SIGINT', 'SIGTERM'] as const)
  process.once(signal, () => {
    isCutOff = true
    opened.verb?.child.kill('SIGTERM')
  })

interface Told {
  type: string
  [key: string]: unknown
}

/** Runs a verb to its end; what it printed as JSON. */
async function tunemesh(args: string[], state = stateDir): Promise<Told[]> {
  opened.verb = new CliProcess(['--state-dir', state, '--json', ...args])
  const { code, stdout, stderr } = await opened.verb.ended
  assert.equal(code, 0, `tunemesh ${args.join(' ')}: ${stdout.slice(-2000)} ${stderr.slice(-2000)}`)
  return jsonLines(stdout) as Told[]
}

const find = <T>(told: Told[], type: string): T => {
  const found = told.find((line) => line.type === type)
  assert.ok(found, `no "${type}" was told`)
  return found as T
}

async function doctor(): Promise<string> {
  const { findings } = find<{ findings: { name: string; verdict: string; seen: string }[] }>(
    await tunemesh(['doctor']),
    'doctor',
  )
  const gpus = findings.filter(({ name }) => name === 'gpu')
  if (values.device.startsWith('cuda'))
    assert.ok(
      gpus.some(({ verdict, seen }) => verdict === 'good' && seen.startsWith(values.device)),
      `${values.device} is not listed: ${gpus.map(({ seen }) => seen).join('; ')}`,
    )
  return `${findings.length} findings; ${gpus[0]?.seen ?? 'no gpu line'}`
}

async function startMesh(): Promise<string> {
  const args = ['up', '--workers', '2', ...onDevice, '--grpc-port', '0', '--dashboard-port', '0']
  const up = new CliProcess(['--state-dir', stateDir, '--json', ...args])
  opened.up = up
  await up.until(/"type":"mesh"/)
  const mesh = find<{ grpc: string; dashboard: string }>(jsonLines(up.stdout) as Told[], 'mesh')
  made.dashboard = mesh.dashboard
  return `coordinator at ${mesh.grpc}`
}

interface Worker {
  device: string
  state: string
  precisions: string[]
}

const attachMs = 60_000

/** Workers attach once their device is open. */
async function fleet(): Promise<string> {
  for (const startMs = performance.now(); ; ) {
    assert.ok(performance.now() - startMs < attachMs, 'two workers do not attach in 60 s')
    const { workers } = find<{ workers: Worker[] }>(await tunemesh(['fleet']), 'fleet')
    if (workers.length < 2) continue
    made.device = workers[0]?.device ?? ''
    if (values.device !== 'auto')
      for (const { device } of workers)
        assert.ok(device.startsWith(values.device.split(':')[0] ?? ''), device)
    return `${workers.length} workers: ${made.device} (${workers[0]?.precisions.join(', ')})`
  }
}

async function openPage(): Promise<string> {
  const page = await PageClient.open(made.dashboard)
  opened.page = page
  return `${page.numFiles} files, live feed open`
}

interface Result {
  job: { jobId: string; state: string; weightsSha256: string; artifacts: { path: string }[] }
}

async function trainTwo(): Promise<string> {
  const told = await tunemesh(['train', jobFile, '--output-dir', join(folder, 'adapter')])
  const { job } = find<Result>(told, 'result')
  assert.equal(job.state, 'SUCCEEDED')
  made.jobId = job.jobId
  made.weights = job.weightsSha256
  const losses = lossesOf(told)
  assert.ok((losses.at(-1) ?? Infinity) < (losses[0] ?? 0), 'the loss falls')
  const parted = told.filter(({ step }) => sharesOf(step).length === 2).length
  assert.ok(parted > 0, 'both workers take part')
  return `${losses.length} steps, ${parted} by both; ${lossText(losses)}`
}

const sharesOf = (step: unknown): { numMicroBatches: number }[] =>
  ((step as { shares?: { numMicroBatches: number }[] } | undefined)?.shares ?? []).filter(
    ({ numMicroBatches }) => numMicroBatches > 0,
  )
const lossesOf = (told: Told[]): number[] =>
  told.flatMap(({ step }) => (step ? [(step as { loss: number }).loss] : []))
const lossText = (losses: number[]) =>
  `loss ${losses[0]?.toFixed(4)} → ${losses.at(-1)?.toFixed(4)}`

async function pageSaw(): Promise<string> {
  const { page } = opened
  assert.ok(page, 'the page did not open')
  const { steps, numWorkers } = page.seen(made.jobId)
  const wanted = steps.map((_, index) => index + 1)
  assert.ok(steps.length > 0, 'the feed told no step')
  assert.deepEqual(steps, wanted, 'the feed tells each step once, in order')
  assert.equal(numWorkers, 2)
  page.close()
  return `the feed told ${steps.length} steps of the job, 2 workers`
}

async function chat(): Promise<string> {
  const told = await tunemesh(['chat', made.jobId, '--prompt', 'What is a goldfinch?'])
  const { text } = find<{ text: string }>(told, 'answer')
  assert.notEqual(text.trim(), '')
  return JSON.stringify(text.slice(0, 60))
}

async function stopMesh(): Promise<string> {
  const { up } = opened
  assert.ok(up)
  up.interrupt()
  const { code, stderr } = await up.ended
  assert.equal(code, 0, stderr)
  return 'ended by Ctrl-C, exit 0'
}

async function trainOne(): Promise<string> {
  const args = ['--workers', '1', ...onDevice, '--output-dir', join(folder, 'adapter-1')]
  const told = await tunemesh(['train', jobFile, ...args], join(folder, 'state-1'))
  const { job } = find<Result>(told, 'result')
  assert.equal(job.weightsSha256, made.weights, 'one worker makes the weights that two made')
  return `the same weights, sha256 ${made.weights.slice(0, 12)}…`
}

/** In the precision that the job was computed in: bf16 where all workers have GPUs. */
async function peft(model: string, adapter: string): Promise<string> {
  const modules = 'import torch, transformers, peft'
  if (spawnSync(values.python, ['-c', modules], { stdio: 'ignore' }).status !== 0)
    throw new Skip(`${values.python} has no torch, transformers and peft`)
  const how = made.device.startsWith('cuda')
    ? ['--device', 'cuda:0', '--precision', 'bf16']
    : ['--device', 'cpu', '--precision', 'fp32']
  if (model !== example) how.push('--fp32-limit', '2e-3')
  const script = join(top, 'bench/peers/adapter.py')
  const child = spawn(values.python, [script, model, adapter, ...how], { stdio: 'pipe' })
  let stdout = ''
  let stderr = ''
  child.stdout.on('data', (data) => (stdout += data))
  child.stderr.on('data', (data) => (stderr += data))
  const code = await new Promise((settle) => child.once('close', settle))
  writeFileSync(join(folder, 'peft.jsonl'), stdout, { flag: 'a' })
  assert.equal(code, 0, `${stdout} ${stderr.slice(-2000)}`)
  const rows = jsonLines(stdout) as Record<string, number | string | undefined>[]
  const text = rows.map((row) => {
    const ours = Number(row.relative_error).toExponential(1)
    const torch = row.torch_bf16_relative_error
    const beside = torch === undefined ? '' : `, torch's bf16 ${Number(torch).toExponential(1)}`
    return `${row.what}: off by ${ours}${beside}, best token ${row.same_argmax}`
  })
  return text.join('; ')
}

const rowsOfReal = () => resolve(values.data ?? join(example, 'rows.jsonl'))
const wholeModel = join(folder, 'real-model')
const realAdapter = join(folder, 'real-adapter')
const realState = join(folder, 'state-real')

function realModel(): string {
  if (values.model === undefined) throw new Skip('no --model')
  return resolve(values.model)
}

async function trainReal(model: string, output: string, settings: string[]): Promise<Told[]> {
  const path = join(folder, 'real.yaml')
  const lines = [`model: ${JSON.stringify(model)}`, `data: ${JSON.stringify(rowsOfReal())}`]
  lines.push('max_length: 256', 'on_long_row: drop', 'save_steps: 0', ...settings)
  writeFileSync(path, `${lines.join('\n')}\n`)
  const numWorkers = settings.includes('finetuning: full') ? '1' : '2'
  const args = ['--workers', numWorkers, ...onDevice, '--output-dir', output]
  const told = await tunemesh(['train', path, ...args], realState)
  assert.equal(find<Result>(told, 'result').job.state, 'SUCCEEDED')
  return told
}

async function answerOf(how: string[]): Promise<string> {
  const ask = ['--prompt', 'What is the capital of France?', '--max-new-tokens', '24', ...onDevice]
  return find<{ text: string }>(await tunemesh(['chat', ...how, ...ask], realState), 'answer').text
}

/** One step of all weights makes a Hugging Face folder, whatever the model came as. */
async function trainWhole(): Promise<string> {
  const settings = ['finetuning: full', 'max_steps: 1', 'learning_rate: 1e-6']
  const told = await trainReal(realModel(), wholeModel, [
    ...settings,
    'gradient_accumulation_steps: 1',
  ])
  const base = await answerOf(['--model', realModel()])
  const whole = await answerOf(['--model', wholeModel])
  assert.match(base, /Paris/)
  assert.match(whole, /Paris/)
  return `loss ${lossesOf(told)[0]?.toFixed(4)}; base and trained say ${JSON.stringify(whole)}`
}

async function tuneWhole(): Promise<string> {
  realModel()
  const steps = Number(values.steps)
  const settings = [`max_steps: ${steps}`, 'warmup_steps: 1', 'per_device_train_batch_size: 2']
  const told = await trainReal(wholeModel, realAdapter, [
    ...settings,
    'gradient_accumulation_steps: 2',
  ])
  const losses = lossesOf(told)
  assert.equal(losses.length, steps)
  // A few steps tell nothing: each has rows of its own.
  assert.ok(steps < 10 || (losses.at(-1) ?? Infinity) < (losses[0] ?? 0), 'the loss falls')
  const tuned = await answerOf([find<Result>(told, 'result').job.jobId])
  return `${lossText(losses)}; it says ${JSON.stringify(tuned)}`
}

async function run(name: string, part: () => Promise<string>): Promise<void> {
  if (isCutOff) return
  const startMs = performance.now()
  let outcome: Outcome = 'ok'
  let note = ''
  try {
    note = await part()
  } catch (error) {
    outcome = error instanceof Skip ? 'skipped' : 'FAILED'
    note = error instanceof Error ? error.message : String(error)
  }
  const seconds = (performance.now() - startMs) / 1e3
  parts.push({ name, outcome, seconds, note })
  console.log(`${outcome.padEnd(8)}${name.padEnd(26)}${seconds.toFixed(1).padStart(6)} s  ${note}`)
}

/** What workers say where a part failed. */
function logsOf(state: string): string {
  const path = join(state, 'logs/coordinator.log')
  return existsSync(path) ? readFileSync(path, 'utf8').slice(-4000) : ''
}

try {
  await run('doctor', doctor)
  await run('up, two workers', startMesh)
  await run('fleet', fleet)
  await run('dashboard opens', openPage)
  await run('train on two workers', trainTwo)
  await run('dashboard was live', pageSaw)
  await run('chat with the adapter', chat)
  await run('up ends', stopMesh)
  await run('train on one worker', trainOne)
  await run('adapter in peft and back', () => peft(example, join(folder, 'adapter')))
  await run('a real model, whole', trainWhole)
  await run('a real model, tuned', tuneWhole)
  await run('its adapter in peft', async () => realModel() && peft(wholeModel, realAdapter))
} finally {
  opened.up?.child.kill('SIGTERM')
  await opened.up?.ended
  if (parts.some(({ outcome }) => outcome === 'FAILED')) console.error(logsOf(stateDir))
  if (values.keep === undefined) rmSync(folder, { recursive: true, force: true })
}
const count = (outcome: Outcome) => parts.filter((part) => part.outcome === outcome).length
console.log(`${count('ok')} passed, ${count('FAILED')} failed, ${count('skipped')} skipped`)
const isBad = isCutOff || count('FAILED') > 0 || (values['no-skips'] && count('skipped') > 0)
process.exitCode = isBad ? 1 : 0
