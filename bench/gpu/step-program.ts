/**
 * One row on the engine: runs gpu_step_bench, and asks the driver what the card holds meanwhile.
 */
import { spawn, spawnSync } from 'node:child_process'
import { createInterface } from 'node:readline'
import type { Row } from './rows.js'

export interface OpTime {
  op: string
  calls: number
  ms: number
  flops: number
  bytes: number
}

interface StepResult {
  ms: number
  min_ms: number
  tokens_per_second: number
  load_s: number
  device: string
  predicted_bytes: number
  plan_bytes: number
  trained_parameters: number
  uses: Record<string, number>
  products: { shape: string; flops_per_second: number }[]
  profile?: OpTime[]
}

export interface MeasuredStep {
  step: StepResult
  /** What the driver shows above the idle card; null where nvidia-smi is not there. */
  driverBytes: number | null
}

export interface StepProgram {
  path: string
  /** Passed on as they are. */
  options: string[]
}

/** Null where the program failed; it has said why. */
export async function runStep(program: StepProgram, row: Row): Promise<MeasuredStep | null> {
  const work = ['--model', row.model, '--method', row.method, '--precision', row.precision]
  const sizes = ['--batch', String(row.batch), '--seq', String(row.seq), '--hold', '1']
  const idle = usedBytes()
  const child = spawn(program.path, [...work, ...sizes, ...program.options], {
    stdio: ['pipe', 'pipe', 'inherit'],
  })
  const closed = new Promise<number>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve(code ?? 1))
  })
  let measured: MeasuredStep | null = null
  for await (const line of createInterface({ input: child.stdout })) {
    const held = usedBytes()
    const driverBytes = idle === null || held === null ? null : held - idle
    measured = { step: JSON.parse(line) as StepResult, driverBytes }
    child.stdin.end()
  }
  return (await closed) === 0 ? measured : null
}

function usedBytes(): number | null {
  const query = ['--query-gpu=memory.used', '--format=csv,noheader,nounits', '--id=0']
  const done = spawnSync('nvidia-smi', query, { encoding: 'utf8' })
  const mebibytes = Number((done.stdout ?? '').trim())
  return done.status === 0 && mebibytes > 0 ? mebibytes * 2 ** 20 : null
}
