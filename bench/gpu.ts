/**
 * `npm run bench:gpu -- --rows 8b-lora-4x2048,3b-full-4x512` (`all`: every row
 * with a figure to reach) or `--model llama-8b --method lora --batch 4 --seq 2048
 * [--precision fp32|fp8]`; `./tunemesh dev bench:gpu` in the bundle.
 *
 *   --steps N --warmup N   measured steps (9), and those before (5)
 *   --accumulation N       micro-batches of a step (1); peers, which take one, are then left out
 *   --graphs on|off        parts of a step as one launch (on)
 *   --mode both|deterministic|free   sums in a fixed order, or in whatever order is fastest; by
 *                          default both, one after the other, and what the fixed order costs
 *   --memory-gib X         what the engine may take of the card: it recomputes or offloads to fit
 *   --profile              a table of every operation's time beside its floor
 *   --peers LIST           of plain (the default), compile, liger and checkpoint: transformers'
 *                          Trainer so run, or several joined by +; torchtune: its recipe for LoRA;
 *                          all: the four without recomputation; or none
 *   --peer-limit SECONDS   of one peer (150): it is stopped, and the others go on
 *   --wheels DIR           Python packages that peers need and python3 lacks, as *.whl
 *                          (bench/peers/wheels.txt)
 *   --no-ceilings          no rates of the card, and so no limit
 *   --out FILE             where rows are appended, one JSON object a line
 *   --device cpu, --plugin PATH, --libraries DIR, --loss-rows N, --threads N   to the engine
 *
 * The engine's own training step without a mesh (bench/native/gpu_step_bench.cc), beside the card's
 * ceilings and a peer's step in the same call where python3 has torch.
 */
import { spawnSync } from 'node:child_process'
import { appendFileSync, existsSync, readFileSync, statSync, truncateSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { type Ceilings, limitOf } from './gpu/limits.js'
import { opTable } from './gpu/op-table.js'
import { parseRows, type Row, rowOf } from './gpu/rows.js'
import { runStep, type StepProgram, type StepResult } from './gpu/step-program.js'
import {
  measureCeilings,
  PeerPackages,
  type PeerResult,
  type PeerRuns,
  runPeers,
  torchDevice,
} from './gpu/torch.js'

const top = fileURLToPath(new URL('../../', import.meta.url))
const peersDir = `${top}bench/peers/`
const gib = 2 ** 30

const text = { type: 'string' } as const
const flag = { type: 'boolean', default: false } as const
const { values } = parseArgs({
  options: {
    rows: text,
    model: text,
    method: text,
    batch: text,
    seq: text,
    precision: text,
    steps: text,
    warmup: text,
    device: text,
    plugin: text,
    libraries: text,
    threads: text,
    'loss-rows': text,
    graphs: text,
    accumulation: text,
    mode: { type: 'string', default: 'both' },
    'memory-gib': text,
    out: { type: 'string', default: `${top}build/bench-gpu.jsonl` },
    program: { type: 'string', default: `${top}build/native-cmake/gpu_step_bench` },
    peers: { type: 'string', default: 'plain' },
    'peer-limit': { type: 'string', default: '150' },
    wheels: text,
    profile: flag,
    'no-ceilings': flag,
  },
})

/** What a row leaves in the file; its first sixteen fields are what results are compared by. */
interface Record {
  row: string
  method: string
  model: string
  batch: number
  seq: number
  dtype: string
  mode: string
  tokens_per_second: number
  peer: string | null
  peer_tokens_per_second: number | null
  limit_tokens_per_second: number | null
  /** Arenas and the libraries' workspaces. */
  peak_gib: number
  /** The plan with context, modules and libraries: what the driver shows above the idle card. */
  predicted_gib: number
  device: string
  date: string
  commit: string | null
  driver_gib: number | null
  /** Micro-batches of a step. */
  accumulation: number
  ms: number
  outside_share: number | null
  peer_peak_gib: number | null
  /** What it was told to stay within; null: what the card has. */
  memory_gib: number | null
  /** Pinned memory of the host, and layers that do not keep all of their activations. */
  host_gib: number
  recomputed_layers: number
  offloaded_layers: number
  /** All that ran. */
  peers: PeerResult[]
}

/** The bundle carries the commit in a file. */
function commit(): string | null {
  const carried = `${top}build/commit.txt`
  if (existsSync(carried)) return readFileSync(carried, 'utf8').trim()
  const done = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: top, encoding: 'utf8' })
  return done.status === 0 ? done.stdout.trim() : null
}

function rowsOf(): Row[] {
  if (values.rows !== undefined) return parseRows(values.rows)
  const { model, method, batch, seq, precision } = values
  return [rowOf({ model, method, batch, seq, precision })]
}

type Mode = 'deterministic' | 'free'

function modesOf(wanted: string): Mode[] {
  if (wanted === 'both') return ['deterministic', 'free']
  if (wanted === 'deterministic' || wanted === 'free') return [wanted]
  throw new RangeError(`--mode is ${wanted}; use both, deterministic or free.`)
}

function stepProgram(mode: Mode): StepProgram {
  const passedOn = [
    'steps',
    'warmup',
    'device',
    'plugin',
    'libraries',
    'threads',
    'loss-rows',
    'graphs',
    'accumulation',
    'memory-gib',
  ]
  const options = passedOn.flatMap((name) => {
    const value = (values as { [name: string]: string | boolean | undefined })[name]
    return typeof value === 'string' ? [`--${name}`, value] : []
  })
  options.push('--mode', mode)
  if (values.profile) options.push('--profile', '1')
  if (!values['no-ceilings']) options.push('--ceilings', '1')
  return { path: values.program, options }
}

interface Found {
  step: StepResult
  card: Ceilings | null
  peers: PeerResult[]
}

function recordOf(row: Row, { step, card, peers }: Found): Record {
  const isKnown = card !== null && row.precision !== 'fp32'
  const hasRate = row.precision !== 'fp8' || card?.fp8 !== undefined
  const [best] = peers
  return {
    row: row.name,
    method: row.method,
    model: row.model,
    batch: row.batch,
    seq: row.seq,
    dtype: row.precision,
    mode: step.mode,
    tokens_per_second: step.tokens_per_second,
    peer: best?.peer ?? null,
    peer_tokens_per_second: best?.tokensPerSecond ?? null,
    limit_tokens_per_second:
      isKnown && hasRate
        ? limitOf(card, { ...row, accumulation: step.accumulation }).tokensPerSecond
        : null,
    peak_gib: (step.plan_bytes + step.workspace_bytes) / gib,
    predicted_gib: step.predicted_bytes / gib,
    device: step.device,
    date: new Date().toISOString(),
    commit: commit(),
    driver_gib: step.driver_bytes === null ? null : step.driver_bytes / gib,
    accumulation: step.accumulation,
    ms: step.ms,
    outside_share: step.outside_share,
    peer_peak_gib: best?.peakGib ?? null,
    memory_gib: values['memory-gib'] === undefined ? null : Number(values['memory-gib']),
    host_gib: step.host_bytes / gib,
    recomputed_layers: recomputed(step),
    offloaded_layers: step.layers.offloaded,
    peers,
  }
}

/** Norms and SwiGLU alone are cheap: these compute products or attention again. */
const recomputed = ({ layers }: StepResult) => layers.attention_half + layers.input

function print(row: Row, record: Record, { step, card }: Found): void {
  const { tokens_per_second: speed, limit_tokens_per_second: limit } = record
  const whole = (value: number) => Math.round(value).toLocaleString('en')
  console.log(`\n${row.name}  ${whole(speed)} tok/s  ${step.ms.toFixed(2)} ms a step, ${step.mode}`)
  if (limit === null) console.log('limit      not known: no ceilings of this card')
  else console.log(`limit      ${whole(limit)} tok/s: share ${(speed / limit).toFixed(3)}`)
  if (record.peer_tokens_per_second === null) console.log('peer       none ran')
  else
    console.log(
      `peer       ${whole(record.peer_tokens_per_second)} tok/s (${record.peer}, ` +
        `${record.peer_peak_gib?.toFixed(1)} GiB): ` +
        `×${(speed / record.peer_tokens_per_second).toFixed(2)}`,
    )
  if (step.outside_share !== null)
    console.log(
      `outside    ${(100 * step.outside_share).toFixed(2)} % of a step without device work, ` +
        'issued call by call',
    )
  printMemory(record, step)
  for (const { shape, flops_per_second: rate } of step.products)
    console.log(`product    ${shape}: ${(rate / 1e12).toFixed(1)} TFLOP/s sustained`)
  if (values.profile && step.profile !== undefined)
    console.log(opTable(step.profile, { card, outsideShare: step.outside_share }, row))
}

function printMemory(record: Record, step: StepResult): void {
  const { peak_gib: peak, predicted_gib: predicted, driver_gib: driver } = record
  const overhead = (step.overhead_bytes / gib).toFixed(2)
  console.log(
    `memory     ${peak.toFixed(2)} GiB in arenas and workspaces; ${predicted.toFixed(2)} ` +
      `predicted with ${overhead} of context and libraries`,
  )
  if (driver === null) console.log('           the driver does not tell what is in use')
  else {
    const off = predicted - driver
    console.log(
      `           the driver shows ${driver.toFixed(2)} GiB above the idle card: ` +
        `${((100 * off) / driver).toFixed(1)} %, ${(off * 1024).toFixed(0)} MiB off`,
    )
  }
  const { everything, products, attention_half: half, input, offloaded } = step.layers
  const where = step.embedding_on_host ? ', embedding there' : ''
  console.log(
    `layers     ${everything} keep everything, ${products} their products, ${half} up to ` +
      `attention, ${input} their input, ${offloaded} on the host (` +
      `${(step.host_bytes / gib).toFixed(2)} GiB${where})`,
  )
  const uses = Object.entries(step.uses).sort(([, a], [, b]) => b - a)
  console.log(`           ${uses.map(([use, n]) => `${use} ${(n / gib).toFixed(2)}`).join(', ')}`)
}

const fastVariants = ['plain', 'compile', 'liger', 'torchtune']

function variantsOf(list: string): string[] {
  if (list === 'none') return []
  return list === 'all' ? fastVariants : list.split(',')
}

/** The file up to `size`, then the records: those without a peer give way to the whole ones. */
function write(row: Row, found: Found[], size: number): void {
  if (existsSync(values.out)) truncateSync(values.out, size)
  for (const one of found) appendFileSync(values.out, `${JSON.stringify(recordOf(row, one))}\n`)
}

/** The modes one after the other, then the peers beside both. */
async function measure(row: Row, card: Ceilings | null, runs: PeerRuns | null): Promise<boolean> {
  const found: Found[] = []
  const size = statSync(values.out, { throwIfNoEntry: false })?.size ?? 0
  for (const mode of modesOf(values.mode)) {
    const step = await runStep(stepProgram(mode), row)
    if (step === null) {
      console.error(`${row.name} did not run`)
      return false
    }
    found.push({ step, card, peers: [] })
    write(row, found, size)
  }
  const variants = Number(values.accumulation ?? 1) > 1 ? [] : variantsOf(values.peers)
  if (runs !== null && variants.length > 0) {
    // Peers take minutes where they compile: what is known stands already.
    const times = found.map(({ step }) => `${step.ms.toFixed(2)} ms`).join(' and ')
    console.log(`\n${row.name}  ${times} a step; now the peers`)
    const peers = await runPeers(runs, row, variants)
    for (const one of found) one.peers = peers
    write(row, found, size)
  }
  for (const one of found) print(row, recordOf(row, one), one)
  printCost(found)
  return true
}

/** What the same bits cost. */
function printCost([fixed, free]: Found[]): void {
  if (fixed === undefined || free === undefined) return
  const [slow, fast] = [fixed.step.ms, free.step.ms]
  console.log(
    `modes      deterministic ${slow.toFixed(2)} ms, free ${fast.toFixed(2)} ms: ` +
      `the same bits cost ${((slow / fast - 1) * 100).toFixed(1)} %`,
  )
}

function peerRuns(packages: PeerPackages): PeerRuns {
  const limitSeconds = Number(values['peer-limit'])
  if (!(limitSeconds >= 1 && limitSeconds <= 3600))
    throw new RangeError(`--peer-limit is ${values['peer-limit']}; use 1 to 3600 seconds.`)
  return { scriptsDir: peersDir, packages, limitSeconds }
}

async function main(): Promise<number> {
  const rows = rowsOf()
  const path = values.program
  if (!existsSync(path)) {
    console.error(`${path} is not there. Build it with: npm run build`)
    return 2
  }
  const torch = values.device === 'cpu' ? null : torchDevice()
  if (torch === null) console.log('no python3 with torch and a card: no ceilings and no peers')
  const packages = new PeerPackages(torch === null ? undefined : values.wheels, process.env)
  try {
    const runs = torch === null ? null : peerRuns(packages)
    const card = runs === null || values['no-ceilings'] ? null : await measureCeilings(runs, rows)
    if (card !== null)
      console.log(
        `ceilings   ${card.device}: bf16 products ${(card.bf16 / 1e12).toFixed(0)} TFLOP/s, ` +
          `copy ${(card.copy / 1e12).toFixed(2)} TB/s`,
      )
    let failed = 0
    for (const row of rows) failed += (await measure(row, card, runs)) ? 0 : 1
    console.log(`\nappended to ${values.out}`)
    return failed === 0 ? 0 : 1
  } finally {
    packages.remove()
  }
}

try {
  process.exitCode = await main()
} catch (error) {
  if (!(error instanceof RangeError)) throw error
  console.error(error.message)
  process.exitCode = 2
}
