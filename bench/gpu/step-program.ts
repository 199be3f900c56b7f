/** One row on the engine: runs gpu_step_bench. */
import { spawn } from 'node:child_process'
import { createInterface } from 'node:readline'
import type { Row } from './rows.js'

export interface OpTime {
  op: string
  calls: number
  ms: number
  flops: number
  bytes: number
}

export interface StepResult {
  ms: number
  min_ms: number
  tokens_per_second: number
  load_s: number
  accumulation: number
  mode: string
  /** Of a step, in which the device had nothing to do; null where the device has no clock. */
  outside_share: number | null
  device: string
  /** The plan, and what a context, modules and libraries take beside it. */
  predicted_bytes: number
  overhead_bytes: number
  /** Buffers of products and of the exchange that the engine does not plan. */
  workspace_bytes: number
  /** What the driver shows above the idle card; null where it does not tell. */
  driver_bytes: number | null
  /** What the engine's arenas hold. */
  plan_bytes: number
  /** Pinned memory of the host. */
  host_bytes: number
  /** How many layers keep what, or move it to the host. */
  layers: Record<'everything' | 'products' | 'attention_half' | 'input' | 'offloaded', number>
  embedding_on_host: boolean
  trained_parameters: number
  uses: Record<string, number>
  products: { shape: string; flops_per_second: number }[]
  profile?: OpTime[]
}

export interface StepProgram {
  path: string
  /** Passed on as they are. */
  options: string[]
}

/** Null where the program failed; it has said why. */
export async function runStep(program: StepProgram, row: Row): Promise<StepResult | null> {
  const work = ['--model', row.model, '--method', row.method, '--precision', row.precision]
  const sizes = ['--batch', String(row.batch), '--seq', String(row.seq)]
  const child = spawn(program.path, [...work, ...sizes, ...program.options], {
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  const closed = new Promise<number>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve(code ?? 1))
  })
  let result: StepResult | null = null
  for await (const line of createInterface({ input: child.stdout })) {
    result = JSON.parse(line) as StepResult
  }
  return (await closed) === 0 ? result : null
}
