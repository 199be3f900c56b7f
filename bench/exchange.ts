/**
 * `npm run bench -- exchange [--json] [--workers 2,4] [--codecs q24,q12,q8] [--steps 5]
 *                            [--elements 42000000]`
 *
 * One step's gradients between N worker processes over a real nats-server: rounding, packing,
 * sending, adding, publishing, storing. Beside it the baseline: the same elements as float32 along
 * the same paths through the same server and client, neither rounded nor added. CPU seconds are
 * what carries over to other machines: on few cores the wall time is theirs.
 */
import { type ChildProcess, fork, spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { findNatsServer } from '../coordinator/nats-binary.js'
import type { Codec, WorkerSetup } from './exchange/movers.js'
import type { StepReport, ToChild } from './exchange/worker.js'
import { type Column, tableLine } from './rows/table.js'

interface Row {
  workers: number
  codec: Codec
  wallMs: number
  wallMinMs: number
  wallMaxMs: number
  megabytesReceived: number
  workerCpuSeconds: number
  serverCpuSeconds: number
  /** Nanoseconds of all processes for each element of the vector. */
  cpuNsPerElement: number
  timesBaseline: number
  ownJsPercent: number
  clientJsPercent: number
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      json: { type: 'boolean', default: false },
      workers: { type: 'string', default: '2,4' },
      codecs: { type: 'string', default: 'q24,q12,q8' },
      steps: { type: 'string', default: '5' },
      elements: { type: 'string', default: '42000000' },
    },
  })
  const numBlocks = Math.ceil(Number(values.elements) / 256)
  if (!values.json) console.log(tableLine(columns, (column) => column.title))
  for (const numWorkers of values.workers.split(',').map(Number)) {
    let baseline = 0
    for (const codec of ['fp32', ...values.codecs.split(',')] as Codec[]) {
      const row = await measure({ numWorkers, numBlocks, codec, numSteps: Number(values.steps) })
      if (codec === 'fp32') baseline = row.cpuNsPerElement
      row.timesBaseline = row.cpuNsPerElement / baseline
      console.log(
        values.json ? JSON.stringify(row) : tableLine(columns, (column) => column.text(row)),
      )
    }
  }
}

interface Measurement {
  numWorkers: number
  numBlocks: number
  codec: Codec
  numSteps: number
}

async function measure({ numWorkers, numBlocks, codec, numSteps }: Measurement): Promise<Row> {
  const server = await startServer()
  const children: WorkerChild[] = []
  for (let index = 0; index < numWorkers; index++) {
    children.push(new WorkerChild({ url: server.url, index, numWorkers, numBlocks, codec }))
  }
  await Promise.all(children.map((child) => child.ready()))
  const walls: number[] = []
  const workerCpu: number[] = []
  const serverCpu: number[] = []
  let reports: StepReport[] = []
  // Step 0 warms up, the last one is profiled; neither is counted.
  for (let step = 0; step <= numSteps + 1; step++) {
    const serverBefore = cpuSecondsOf(server.process)
    const start = performance.now()
    const isProfiled = step === numSteps + 1
    await Promise.all(children.map((child) => child.step(step, isProfiled)))
    const wallMs = performance.now() - start
    reports = await Promise.all(children.map((child) => child.report()))
    if (step === 0 || isProfiled) continue
    walls.push(wallMs)
    workerCpu.push(sum(reports.map((report) => report.cpuSeconds)))
    serverCpu.push(cpuSecondsOf(server.process) - serverBefore)
  }
  await Promise.all(children.map((child) => child.end()))
  server.stop()
  const cpuSeconds = median(workerCpu) + median(serverCpu)
  return {
    workers: numWorkers,
    codec,
    wallMs: median(walls),
    wallMinMs: Math.min(...walls),
    wallMaxMs: Math.max(...walls),
    megabytesReceived: sum(reports.map((report) => report.bytesReceived)) / 1e6,
    workerCpuSeconds: median(workerCpu) / numWorkers,
    serverCpuSeconds: median(serverCpu),
    cpuNsPerElement: (cpuSeconds * 1e9) / (numBlocks * 256),
    timesBaseline: 1,
    ownJsPercent: 100 * Math.max(...reports.map((report) => report.ownShare ?? 0)),
    clientJsPercent: 100 * Math.max(...reports.map((report) => report.clientShare ?? 0)),
  }
}

class WorkerChild {
  readonly #process: ChildProcess

  constructor(setup: WorkerSetup) {
    const program = new URL('./exchange/worker.js', import.meta.url)
    // From the sources the same loader runs the child.
    const isSource = import.meta.url.endsWith('.ts')
    const path = fileURLToPath(
      isSource ? new URL('./exchange/worker.ts', import.meta.url) : program,
    )
    this.#process = fork(path, [JSON.stringify(setup)], { serialization: 'advanced' })
    this.#process.on('exit', (code) => {
      if (code !== 0) throw new Error(`worker ${setup.index} ended with ${code}`)
    })
  }

  async ready(): Promise<void> {
    await this.#answer()
  }
  async step(step: number, isProfiled: boolean): Promise<void> {
    await this.#ask({ kind: 'step', step, isProfiled })
  }
  async report(): Promise<StepReport> {
    return (await this.#ask({ kind: 'report' })) as StepReport
  }
  async end(): Promise<void> {
    const ended = once(this.#process, 'exit')
    this.#process.send({ kind: 'end' } satisfies ToChild)
    await ended
  }

  #ask(message: ToChild): Promise<unknown> {
    const answer = this.#answer()
    this.#process.send(message)
    return answer
  }
  async #answer(): Promise<unknown> {
    const [answer] = await once(this.#process, 'message')
    return answer
  }
}

async function startServer() {
  const found = await findNatsServer({
    explicit: process.env.TUNEMESH_NATS_SERVER ?? '',
    path: process.env.PATH ?? '',
    cacheDir: join(
      process.env.XDG_CACHE_HOME || join(homedir(), '.cache'),
      'tunemesh',
      'nats-server',
    ),
  })
  const probe = createServer().listen(0, '127.0.0.1')
  await once(probe, 'listening')
  const { port } = probe.address() as { port: number }
  probe.close()
  await once(probe, 'close')
  const child = spawn(found.path, ['-a', '127.0.0.1', '-p', String(port)], { stdio: 'ignore' })
  return { url: `nats://127.0.0.1:${port}`, process: child, stop: () => child.kill('SIGKILL') }
}

/** User and system time from the process table, in hundredths. */
function cpuSecondsOf(child: ChildProcess): number {
  const fields = readFileSync(`/proc/${child.pid}/stat`, 'utf8').split(') ')[1]?.split(' ') ?? []
  return (Number(fields[11]) + Number(fields[12])) / 100
}

const sum = (values: readonly number[]) => values.reduce((total, value) => total + value, 0)
const median = (values: readonly number[]) =>
  [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN

const columns: Column<Row>[] = [
  { title: 'workers', width: 7, text: (row) => `${row.workers}` },
  { title: 'codec', width: 5, text: (row) => row.codec },
  { title: 'wall ms', width: 8, text: (row) => row.wallMs.toFixed(0) },
  {
    title: 'min-max',
    width: 11,
    text: (row) => `${row.wallMinMs.toFixed(0)}-${row.wallMaxMs.toFixed(0)}`,
  },
  { title: 'MB in', width: 7, text: (row) => row.megabytesReceived.toFixed(0) },
  { title: 'worker CPU s', width: 12, text: (row) => row.workerCpuSeconds.toFixed(2) },
  { title: 'server CPU s', width: 12, text: (row) => row.serverCpuSeconds.toFixed(2) },
  { title: 'CPU ns/element', width: 14, text: (row) => row.cpuNsPerElement.toFixed(1) },
  { title: 'x fp32', width: 6, text: (row) => row.timesBaseline.toFixed(2) },
  { title: 'own JS %', width: 8, text: (row) => row.ownJsPercent.toFixed(1) },
  { title: 'client JS %', width: 11, text: (row) => row.clientJsPercent.toFixed(1) },
]
await main()
