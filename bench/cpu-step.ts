/**
 * `npm run bench -- cpu-step [--json] [--threads N] [--path avx2] [--rounds N] [--only TEXT]
 * [--program PATH]`
 *
 * Whole training steps of the engine as a share of the multiply-add peak measured around them
 * (bench/native/step_bench.cc); where python3 has torch, transformers and peft, their step beside
 * it.
 */
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { parseArgs } from 'node:util'

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

function tableLine(row: StepRow): string {
  const peer = row.peer_tokens_per_second
  return [
    row.work.padEnd(22),
    row.ms.toFixed(1).padStart(9),
    row.tokens_per_second.toFixed(0).padStart(7),
    row.gflops.toFixed(0).padStart(8),
    row.peak_gflops.toFixed(0).padStart(6),
    `${(100 * row.share).toFixed(1)} %`.padStart(7),
    (row.plan_bytes / 2 ** 20).toFixed(0).padStart(8),
    peer === null ? 'not here' : peer.toFixed(0).padStart(8),
  ].join('  ')
}

function main(): number {
  const { values } = parseArgs({
    options: {
      json: { type: 'boolean', default: false },
      program: { type: 'string', default: 'build/native-cmake/step_bench' },
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
  const done = spawnSync(values.program, args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  if (!values.json) {
    console.log(
      'work                          ms    tok/s   GFLOP/s    peak   share  plan MiB  peer tok/s',
    )
  }
  for (const line of done.stdout.split('\n').filter(Boolean)) {
    const row = JSON.parse(line) as StepRow
    row.peer_tokens_per_second = peerSpeed(row)
    console.log(values.json ? JSON.stringify(row) : tableLine(row))
  }
  return done.status ?? 1
}

process.exitCode = main()
