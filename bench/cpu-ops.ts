/**
 * `npm run bench -- cpu-ops [--json] [--threads N] [--path avx2] [--documents N] [--rounds N]
 * [--only TEXT] [--program PATH]`
 *
 * What a LoRA training step of SmolLM2-135M spends outside of matrix products, operation by
 * operation, beside the frozen base's products (bench/native/ops_bench.cc).
 */
import { runNativeBench } from './rows/native-bench.js'
import type { Column } from './rows/table.js'

interface OpsRow {
  operation: string
  is_product: boolean
  path: string
  threads: number
  documents: number
  /** CPU time of the process, of one call. */
  median_ms: number
  best_ms: number
  gb_per_second: number
  gflops: number
  /** All calls of a step. */
  step_ms: number
}

const columns: Column<OpsRow>[] = [
  { title: 'operation', width: -30, text: (row) => row.operation },
  { title: 'median ms', width: 9, text: (row) => row.median_ms.toFixed(3) },
  { title: 'best ms', width: 9, text: (row) => row.best_ms.toFixed(3) },
  { title: 'GB/s', width: 8, text: (row) => row.gb_per_second.toFixed(1) },
  { title: 'GFLOP/s', width: 8, text: (row) => row.gflops.toFixed(1) },
  { title: 'ms a step', width: 9, text: (row) => row.step_ms.toFixed(2) },
]

function summary(rows: OpsRow[]): string {
  const total = (wanted: boolean) =>
    rows.reduce((sum, row) => sum + (row.is_product === wanted ? row.step_ms : 0), 0)
  const products = total(true)
  const other = total(false)
  const share = ((100 * other) / (products + other)).toFixed(1)
  return (
    `products of the base ${products.toFixed(0)} ms, all else ${other.toFixed(0)} ms: ` +
    `${share} % of the step`
  )
}

process.exitCode = await runNativeBench<OpsRow>({
  program: 'ops_bench',
  moreOptions: ['documents'],
  columns,
  heading: (row) =>
    `${row.path}, ${row.threads} thread(s), ${row.documents} document(s); CPU time of one call`,
  summary,
})
