/**
 * `npm run bench -- cpu-gemm [--json] [--threads N] [--path avx2] [--rounds N] [--only TEXT]
 * [--program PATH]`
 *
 * Matrix products of the CPU backend beside a register-only multiply-add loop on the same threads.
 * The measuring is native (bench/native/gemm_bench.cc); this prints its rows.
 */
import { runNativeBench } from './rows/native-bench.js'
import type { Column } from './rows/table.js'

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

const columns: Column<GemmRow>[] = [
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

process.exitCode = await runNativeBench<GemmRow>({
  program: 'gemm_bench',
  columns,
  heading: (row) => `${row.path}, ${row.threads} thread(s); medians; peak is a multiply-add loop`,
})
