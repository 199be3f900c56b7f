/**
 * `npm run bench -- drug-names-control [--record] [--json]`: the drug-names example beside its
 * control, which is the same training on answers shuffled among the questions. What the right
 * answers gain over it on rephrased questions is knowledge; what both gain is style. Several seeds
 * of the adapter and the order, means and spread.
 */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { connect, type TunemeshClient } from '../client/client.js'
import { startEmbedded } from '../client/embedded.js'
import { writeRows } from '../examples/drug-names/build-rows.js'
import { trainAndJudge } from '../examples/drug-names/train-and-judge.js'

const { values } = parseArgs({
  options: {
    base: { type: 'string' },
    seeds: { type: 'string', default: '1,2,3' },
    record: { type: 'boolean', default: false },
    json: { type: 'boolean', default: false },
  },
})
const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')
const model = values.base ?? join(cacheDir, 'models', 'SmolLM2-135M-Instruct.Q4_1.gguf')
const seeds = values.seeds.split(',')

interface Figures {
  seed: string
  answers: 'right' | 'shuffled'
  seenRephrased: number
  neverSeen: number
}

async function measure(client: TunemeshClient, workDir: string): Promise<Figures[]> {
  const rows = writeRows(workDir, 1)
  const figures: Figures[] = []
  for (const seed of seeds) {
    for (const answers of ['right', 'shuffled'] as const) {
      const { losses } = await trainAndJudge(client, {
        model,
        rows,
        data: answers === 'right' ? rows.train : rows.trainShuffled,
        outputDir: join(workDir, `${answers}-${seed}`),
        overrides: [`seed=${seed}`],
      })
      const after = (split: string) => losses.get(split)?.after ?? Number.NaN
      const row = {
        seed,
        answers,
        seenRephrased: after('seen_rephrased'),
        neverSeen: after('never_seen'),
      }
      figures.push(row)
      if (values.json) console.log(JSON.stringify(row))
    }
  }
  return figures
}

const mean = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0) / numbers.length
const spread = (numbers: number[]) => Math.max(...numbers) - Math.min(...numbers)

function report(figures: Figures[]): void {
  const of = (answers: Figures['answers'], key: 'seenRephrased' | 'neverSeen') =>
    figures.filter((row) => row.answers === answers).map((row) => row[key])
  console.log('answer-token loss after training   right (spread)   shuffled (spread)   better by')
  for (const key of ['seenRephrased', 'neverSeen'] as const) {
    const [right, shuffled] = [of('right', key), of('shuffled', key)]
    const gain = (1 - mean(right) / mean(shuffled)) * 100
    const cell = (numbers: number[]) =>
      `${mean(numbers).toFixed(3)} (${spread(numbers).toFixed(3)})`
    console.log(
      [key.padEnd(34), cell(right).padEnd(16), cell(shuffled).padEnd(19), gain.toFixed(1)].join(
        ' ',
      ),
      '%',
    )
  }
  if (!values.record) return
  const control = {
    seenRephrased: mean(of('shuffled', 'seenRephrased')),
    neverSeen: mean(of('shuffled', 'neverSeen')),
  }
  writeFileSync('bench/results/drug-names-control.json', `${JSON.stringify(control, null, 2)}\n`)
}

if (!existsSync(model)) {
  console.error(`MODEL_NOT_FOUND ${model} is not there: node scripts/model-setup.mjs fetches it.`)
  process.exit(2)
}
const workDir = mkdtempSync(join(tmpdir(), 'tunemesh-bench-'))
const mesh = await startEmbedded({
  stateDir: join(workDir, 'state'),
  numWorkers: 2,
  dashboardPort: null,
})
const client = connect({ address: mesh.endpoint.grpc, token: mesh.endpoint.token })
try {
  const figures = await measure(client, workDir)
  if (!values.json) report(figures)
} finally {
  client.close()
  await mesh.close()
  rmSync(workDir, { recursive: true, force: true })
}
