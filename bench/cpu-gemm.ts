/**
 * `npm run bench -- cpu-gemm [--json] [--threads N] [--path avx2] [--rounds N] [--only TEXT]
 * [--program PATH]`
 *
 * Matrix products of the CPU backend beside a register-only multiply-add loop on the same threads.
 * The measuring is native (bench/native/gemm_bench.cc); this prints its rows.
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'

interface GemmRow {
  group: string
  product: string
  n: number
  in: number
  out: number
  path: string
  threads: number
  ms: number
  min_ms: number
  gflops: number
  peak_gflops: number
  share: number
  cpu_share: number
  gb_per_second: number
}

const columns: { title: string; width: number; text: (row: GemmRow) => string }[] = [
  { title: 'group', width: -10, text: (row) => row.group },
  { title: 'product', width: -16, text: (row) => row.product },
  { title: 'n', width: 5, text: (row) => `${row.n}` },
  { title: 'in', width: 6, text: (row) => `${row.in}` },
  { title: 'out', width: 6, text: (row) => `${row.out}` },
  { title: 'ms', width: 9, text: (row) => row.ms.toFixed(3) },
  { title: 'GFLOP/s', width: 8, text: (row) => row.gflops.toFixed(0) },
  { title: 'peak', width: 6, text: (row) => row.peak_gflops.toFixed(0) },
  { title: '% peak', width: 7, text: (row) => (100 * row.share).toFixed(1) },
  { title: '% by CPU', width: 9, text: (row) => (100 * row.cpu_share).toFixed(1) },
  { title: 'GB/s', width: 6, text: (row) => row.gb_per_second.toFixed(1) },
]

function padded(text: string, width: number): string {
  return width < 0 ? text.padEnd(-width) : text.padStart(width)
}

function tableLine(textOf: (column: (typeof columns)[number]) => string): string {
  return columns.map((column) => padded(textOf(column), column.width)).join('  ')
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      json: { type: 'boolean', default: false },
      program: { type: 'string', default: 'build/native-cmake/gemm_bench' },
      threads: { type: 'string' },
      path: { type: 'string' },
      rounds: { type: 'string' },
      only: { type: 'string' },
    },
  })
  if (!existsSync(values.program)) {
    console.error(`${values.program} is not there. Build it with: npm run build`)
    return 2
  }
  const args = (['threads', 'path', 'rounds', 'only'] as const).flatMap((key) => {
    const value = values[key]
    return value === undefined ? [] : [`--${key}`, value]
  })
  const child = spawn(values.program, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  const closed = new Promise<number>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve(code ?? 1))
  })
  let isFirst = true
  for await (const line of createInterface({ input: child.stdout })) {
    if (values.json) {
      console.log(line)
      continue
    }
    const row = JSON.parse(line) as GemmRow
    if (isFirst) {
      console.log(`${row.path}, ${row.threads} thread(s); medians; peak is a multiply-add loop`)
      console.log(tableLine((column) => column.title))
    }
    isFirst = false
    console.log(tableLine((column) => column.text(row)))
  }
  return closed
}

process.exitCode = await main()
