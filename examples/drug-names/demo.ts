/**
 * `npm run demo`: a real pretrained model learns, on two workers of an embedded mesh, to answer
 * like a dictionary. Shows answers before and after side by side, the loss on rephrased questions
 * about seen entries and on entries never seen, what changed in the weights, and where the adapter
 * lies. Ends by itself.
 *
 *   --base PATH   another model (Hugging Face folder or .gguf)     --out FOLDER     --steps N
 */
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { homedir, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { connect, type JobEvent, type TunemeshClient } from '../../client/client.js'
import { startEmbedded } from '../../client/embedded.js'
import { writeRows } from './build-rows.js'
import { answerTable, changeTable, lossTable } from './demo-tables.js'
import { trainAndJudge } from './train-and-judge.js'

const { values } = parseArgs({
  options: {
    base: { type: 'string' },
    out: { type: 'string', default: 'output/drug-names' },
    steps: { type: 'string' },
    workers: { type: 'string', default: '2' },
  },
})
const top = fileURLToPath(new URL('../../..', import.meta.url))
const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')

/** Asked before and after: entries that are trained, asked in other words, and some never seen. */
const numQuestionsEach = 3
const maxNewTokens = 40

function baseModel(): string {
  const path = resolve(values.base ?? join(cacheDir, 'models', 'SmolLM2-135M-Instruct.Q4_1.gguf'))
  if (existsSync(path)) return path
  console.error(
    `MODEL_NOT_FOUND ${path} is not there. Run npm run demo, which gets it, or give --base PATH.`,
  )
  process.exit(2)
}

interface Row {
  messages: { role: string; content: string }[]
}
const readRows = (path: string): Row[] =>
  readFileSync(path, 'utf8')
    .trim()
    .split('\n')
    .map((line) => JSON.parse(line) as Row)

/** The demo can be run again and again; it empties a folder only where an earlier result lies. */
function freshOutput(): string {
  const path = resolve(values.out)
  if (existsSync(path) && readdirSync(path).length > 0 && !isEarlierResult(path)) {
    console.error(`OUTPUT_IN_USE ${path} holds other files. Choose another folder with --out.`)
    process.exit(2)
  }
  rmSync(path, { recursive: true, force: true })
  mkdirSync(resolve(path, '..'), { recursive: true })
  return path
}

function isEarlierResult(path: string): boolean {
  const record = join(path, 'run.json')
  return existsSync(record) && readFileSync(record, 'utf8').includes('drug names')
}

async function answersOf(
  client: TunemeshClient,
  rows: Row[],
  from: { model?: string; jobId?: string },
) {
  const answers: string[] = []
  for (const { messages } of rows) {
    let text = ''
    const question = messages.filter(({ role }) => role === 'user')
    for await (const part of client.generate({
      ...from,
      messages: question,
      maxNewTokens,
      temperature: 0,
    }))
      text += part.text
    answers.push(text.trim())
  }
  return answers
}

/** One line a tenth of the way; everything else is on the dashboard. */
function showProgress(event: JobEvent): void {
  const { step, stateChanged, log } = event
  if (step && (step.step === 1 || step.step % Math.max(1, Math.round(step.numSteps / 10)) === 0))
    console.log(
      `  step ${String(step.step).padStart(3)} of ${step.numSteps}   ` +
        `loss ${step.loss.toFixed(3)}   ${Math.round(step.tokensPerSecond)} tokens/s   ` +
        `${Math.round(step.etaMs / 1000)} s left`,
    )
  if (log?.level === 'error') console.log(`  ${log.message}`)
  if (stateChanged?.error?.message)
    console.log(`  ${stateChanged.error.code} ${stateChanged.error.message}`)
}

async function demo(client: TunemeshClient, workDir: string): Promise<void> {
  const model = baseModel()
  const rowPaths = writeRows(workDir, 1)
  const seen = readRows(rowPaths.seenRephrased).slice(0, numQuestionsEach)
  const neverSeen = readRows(rowPaths.neverSeen).slice(0, numQuestionsEach)
  const questions = [...seen, ...neverSeen]
  console.log('Asking the base model …')
  const before = await answersOf(client, questions, { model })
  console.log(`Training a LoRA adapter on ${values.workers} workers …`)
  const output = freshOutput()
  const { job, losses } = await trainAndJudge(client, {
    model,
    rows: rowPaths,
    data: rowPaths.train,
    outputDir: output,
    overrides: values.steps ? [`max_steps=${values.steps}`] : [],
    onEvent: showProgress,
  })
  console.log('Asking the tuned model …')
  const after = await answersOf(client, questions, { jobId: job.jobId })
  console.log(
    `\n${answerTable(
      questions.map(({ messages }) => messages[0]?.content ?? ''),
      before,
      after,
    )}`,
  )
  const control = JSON.parse(
    readFileSync(join(top, 'bench/results/drug-names-control.json'), 'utf8'),
  )
  console.log(`\n${lossTable(losses, control)}`)
  console.log(
    `\n${changeTable(JSON.parse(readFileSync(join(output, 'weight_change.json'), 'utf8')))}`,
  )
  console.log(
    `\nThe adapter: ${output}\nQuestions about entries never seen gain the dictionary's style, ` +
      'not its facts: the model makes them up.\n' +
      'This is a demonstration of fine-tuning, and no medical advice.',
  )
}

const workDir = mkdtempSync(join(tmpdir(), 'tunemesh-demo-'))
const mesh = await startEmbedded({
  stateDir: join(workDir, 'state'),
  numWorkers: Number(values.workers),
  threadsPerWorker: 0,
  natsServerPath: process.env.TUNEMESH_NATS_SERVER,
})
const client = connect({ address: mesh.endpoint.grpc, token: mesh.endpoint.token })
/** Leaves no process and no temporary file, however the demo ends. */
async function leave(): Promise<void> {
  client.close()
  await mesh.close()
  rmSync(workDir, { recursive: true, force: true })
}
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => void leave().finally(() => process.exit(130)))
}
try {
  console.log(`Live dashboard while this runs: ${mesh.endpoint.dashboard}`)
  await demo(client, workDir)
} finally {
  await leave()
}
