/**
 * `npm run bench -- cpu-step [--json] [--threads N] [--path avx2] [--rounds N] [--only TEXT]
 * [--program PATH]`
 *
 * Whole training steps of the engine as a share of the multiply-add peak measured around them
 * (bench/native/step_bench.cc); where python3 has torch, transformers and peft, their step beside
 * it.
 */
import { spawnSync } from 'node:child_process'
import { runNativeBench } from './rows/native-bench.js'
import type { Column } from './rows/table.js'

interface StepRow {
  work: string
  path: string
  threads: number
  ms: number
  min_ms: number
  tokens_per_second: number
  gflops: number
  peak_gflops: number
  share: number
  plan_bytes: number
  peer_tokens_per_second: number | null
}

const peerScript = 'bench/peers/step.py'

/** null: no python3 with these packages on this machine. */
function peerSpeed(row: StepRow): number | null {
  const name = row.work.startsWith('5M') ? '5m' : '135m'
  const done = spawnSync('python3', [peerScript, name, String(row.threads)], { encoding: 'utf8' })
  if (done.status !== 0) return null
  return (JSON.parse(done.stdout) as { tokens_per_second: number }).tokens_per_second
}

const columns: Column<StepRow>[] = [
  { title: 'work', width: -22, text: (row) => row.work },
  { title: 'ms', width: 9, text: (row) => row.ms.toFixed(1) },
  { title: 'tok/s', width: 7, text: (row) => row.tokens_per_second.toFixed(0) },
  { title: 'GFLOP/s', width: 8, text: (row) => row.gflops.toFixed(0) },
  { title: 'peak', width: 6, text: (row) => row.peak_gflops.toFixed(0) },
  { title: 'share', width: 7, text: (row) => `${(100 * row.share).toFixed(1)} %` },
  { title: 'plan MiB', width: 8, text: (row) => (row.plan_bytes / 2 ** 20).toFixed(0) },
  {
    title: 'peer tok/s',
    width: 10,
    text: ({ peer_tokens_per_second: peer }) => (peer === null ? 'not here' : peer.toFixed(0)),
  },
]

process.exitCode = await runNativeBench<StepRow>({
  program: 'step_bench',
  columns,
  complete: (row) => ({ ...row, peer_tokens_per_second: peerSpeed(row) }),
})
