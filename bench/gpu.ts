/**
 * `npm run bench:gpu -- --rows 8b-lora-4x2048,3b-full-4x512` or `--model llama-8b --method lora
 * --batch 4 --seq 2048 [--precision fp32]`; `./tunemesh dev bench:gpu` in the bundle.
 *
 *   --steps N --warmup N   measured steps (9), and those before (5)
 *   --profile              a table of every operation's time beside its floor
 *   --peers LIST           of plain (the default), compile, liger and checkpoint: transformers'
 *                          Trainer so run; torchtune: its recipe for LoRA; or none
 *   --no-ceilings          no rates of the card, and so no limit
 *   --out FILE             where rows are appended, one JSON object a line
 *   --device cpu, --plugin PATH, --libraries DIR, --loss-rows N, --threads N   to the engine
 *
 * The engine's own training step without a mesh (bench/native/gpu_step_bench.cc), beside the card's
 * ceilings and a peer's step in the same call where python3 has torch.
 */
import { spawnSync } from 'node:child_process'
import { appendFileSync, existsSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { type Ceilings, limitOf } from './gpu/limits.js'
import { opTable } from './gpu/op-table.js'
import { parseRow, type Row, rowOf } from './gpu/rows.js'
import { type MeasuredStep, runStep, type StepProgram } from './gpu/step-program.js'
import { bestPeer, measureCeilings, type PeerResult, torchDevice } from './gpu/torch.js'

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
    out: { type: 'string', default: `${top}build/bench-gpu.jsonl` },
    program: { type: 'string', default: `${top}build/native-cmake/gpu_step_bench` },
    peers: { type: 'string', default: 'plain' },
    profile: flag,
    'no-ceilings': flag,
  },
})

/** What a finished row leaves in the file. */
interface Record {
  row: string
  method: string
  model: string
  batch: number
  seq: number
  dtype: string
  mode: string
  ms: number
  tokens_per_second: number
  peer: string | null
  peer_tokens_per_second: number | null
  peer_peak_gib: number | null
  limit_tokens_per_second: number | null
  /** What the engine's arenas hold. */
  peak_gib: number
  predicted_gib: number
  /** What the driver shows above the idle card: with context, modules and workspaces. */
  driver_gib: number | null
  device: string
  date: string
  commit: string | null
}

/** The bundle carries the commit in a file. */
function commit(): string | null {
  const carried = `${top}build/commit.txt`
  if (existsSync(carried)) return readFileSync(carried, 'utf8').trim()
  const done = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: top, encoding: 'utf8' })
  return done.status === 0 ? done.stdout.trim() : null
}

function rowsOf(): Row[] {
  if (values.rows !== undefined) return values.rows.split(',').map(parseRow)
  const { model, method, batch, seq, precision } = values
  return [rowOf({ model, method, batch, seq, precision })]
}

function stepProgram(): StepProgram {
  const passedOn = ['steps', 'warmup', 'device', 'plugin', 'libraries', 'threads', 'loss-rows']
  const options = passedOn.flatMap((name) => {
    const value = (values as { [name: string]: string | boolean | undefined })[name]
    return typeof value === 'string' ? [`--${name}`, value] : []
  })
  if (values.profile) options.push('--profile', '1')
  if (!values['no-ceilings']) options.push('--ceilings', '1')
  return { path: values.program, options }
}

interface Found {
  measured: MeasuredStep
  card: Ceilings | null
  peer: PeerResult | null
}

function recordOf(row: Row, { measured, card, peer }: Found): Record {
  const { step, driverBytes } = measured
  const hasLimit = card !== null && row.precision === 'bf16'
  return {
    row: row.name,
    method: row.method,
    model: row.model,
    batch: row.batch,
    seq: row.seq,
    dtype: row.precision,
    mode: 'deterministic',
    ms: step.ms,
    tokens_per_second: step.tokens_per_second,
    peer: peer?.peer ?? null,
    peer_tokens_per_second: peer?.tokensPerSecond ?? null,
    peer_peak_gib: peer?.peakGib ?? null,
    limit_tokens_per_second: hasLimit ? limitOf(card, row).tokensPerSecond : null,
    peak_gib: step.plan_bytes / gib,
    predicted_gib: step.predicted_bytes / gib,
    driver_gib: driverBytes === null ? null : driverBytes / gib,
    device: step.device,
    date: new Date().toISOString(),
    commit: commit(),
  }
}

function print(row: Row, record: Record, { measured, card }: Found): void {
  const { step } = measured
  const { tokens_per_second: speed, limit_tokens_per_second: limit } = record
  const whole = (value: number) => Math.round(value).toLocaleString('en')
  console.log(`\n${row.name}  ${whole(speed)} tok/s  ${step.ms.toFixed(2)} ms a step`)
  if (limit === null) console.log('limit      not known: no ceilings of this card in bf16')
  else console.log(`limit      ${whole(limit)} tok/s: share ${(speed / limit).toFixed(3)}`)
  if (record.peer_tokens_per_second === null) console.log('peer       none ran')
  else
    console.log(
      `peer       ${whole(record.peer_tokens_per_second)} tok/s (${record.peer}, ` +
        `${record.peer_peak_gib?.toFixed(1)} GiB): ` +
        `×${(speed / record.peer_tokens_per_second).toFixed(2)}`,
    )
  const driver = record.driver_gib === null ? 'unknown' : `${record.driver_gib.toFixed(2)} GiB`
  console.log(
    `memory     ${record.peak_gib.toFixed(2)} GiB in arenas, ${record.predicted_gib.toFixed(2)} ` +
      `planned; the driver shows ${driver} above the idle card`,
  )
  const uses = Object.entries(step.uses).sort(([, a], [, b]) => b - a)
  console.log(`           ${uses.map(([use, n]) => `${use} ${(n / gib).toFixed(2)}`).join(', ')}`)
  for (const { shape, flops_per_second: rate } of step.products)
    console.log(`product    ${shape}: ${(rate / 1e12).toFixed(1)} TFLOP/s sustained`)
  if (step.profile !== undefined) console.log(opTable(step.profile, card, row))
}

async function main(): Promise<number> {
  const rows = rowsOf()
  const program = stepProgram()
  if (!existsSync(program.path)) {
    console.error(`${program.path} is not there. Build it with: npm run build`)
    return 2
  }
  const torch = values.device === 'cpu' ? null : torchDevice()
  if (torch === null) console.log('no python3 with torch and a card: no ceilings and no peers')
  const wantsCeilings = torch !== null && !values['no-ceilings']
  const card = wantsCeilings ? measureCeilings(peersDir, rows) : null
  if (card !== null)
    console.log(
      `ceilings   ${card.device}: bf16 products ${(card.bf16 / 1e12).toFixed(0)} TFLOP/s, ` +
        `copy ${(card.copy / 1e12).toFixed(2)} TB/s`,
    )
  const variants = values.peers === 'none' ? [] : values.peers.split(',')
  let failed = 0
  for (const row of rows) {
    const measured = await runStep(program, row)
    if (measured === null) {
      failed += 1
      console.error(`${row.name} did not run`)
      continue
    }
    const hasPeer = torch !== null && variants.length > 0
    // Peers take minutes where they compile: what is known stands already.
    if (hasPeer)
      console.log(`\n${row.name}  ${measured.step.ms.toFixed(2)} ms a step; now the peer`)
    const peer = hasPeer ? bestPeer(peersDir, row, variants) : null
    const found = { measured, card, peer }
    const record = recordOf(row, found)
    appendFileSync(values.out, `${JSON.stringify(record)}\n`)
    print(row, record, found)
  }
  console.log(`\nappended to ${values.out}`)
  return failed === 0 ? 0 : 1
}

try {
  process.exitCode = await main()
} catch (error) {
  if (!(error instanceof RangeError)) throw error
  console.error(error.message)
  process.exitCode = 2
}
