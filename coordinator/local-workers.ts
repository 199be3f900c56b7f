/**
 * Workers of this machine: child processes, started again with back-off when they crash, ended with
 * us.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Logger } from 'pino'
import { lastErrorIn, OutputTail } from '../proto/error-line.js'
import { errorKinds, TunemeshError } from '../proto/errors.js'
import { scriptCommand } from './script-command.js'

const longestDelayMs = 30_000
/** A worker that ran so long before it died starts again without delay. */
const healthyMs = 60_000
/** So many crashes without a step that counted its work, and it is not started again. */
const maxCrashes = 8
const endGraceMs = 8_000

export interface LocalWorkersOptions {
  count: number
  threadsPerWorker: number
  /** "auto": they take the machine's GPUs in turn, or the CPU where there is none. */
  device: string
  coordinator: string
  tokenPath: string
  /** A folder for each worker is made in it. */
  workDir: string
  /** Environment of the workers: nothing secret is in it. */
  env: NodeJS.ProcessEnv
  /** Test knobs by worker; the options reach a worker only with --testing. */
  tuning: { failpoints?: string; options?: Record<string, unknown> }[]
  /** How long a worker that crashed waits; doubles with each crash. */
  firstRestartMs: number
  log: Logger
  /** No worker of this machine is left that is started again. */
  onExhausted: (error: TunemeshError) => void
}

/** The processors divided: more threads than processors make every worker slower. */
export function threadsEach(numWorkers: number, numProcessors: number): number {
  return Math.max(1, Math.floor(numProcessors / Math.max(1, numWorkers)))
}

/** How often one worker has crashed for nothing, and how long it waits for its next start. */
export class CrashLoop {
  #inARow = 0
  #delayMs: number

  constructor(private readonly firstDelayMs: number) {
    this.#delayMs = firstDelayMs
  }

  /** Answers how long to wait; null: it has been started often enough. */
  crashed(ranMs: number): number | null {
    if (++this.#inARow >= maxCrashes) return null
    const waitMs = ranMs > healthyMs ? this.firstDelayMs : this.#delayMs
    this.#delayMs = Math.min(waitMs * 2, longestDelayMs)
    return waitMs
  }

  /** A step stands that its work is in. */
  progressed(): void {
    this.#inARow = 0
    this.#delayMs = this.firstDelayMs
  }
}

interface LocalWorker {
  index: number
  loop: CrashLoop
  child: ChildProcess | null
  /** A step has counted its work: whatever ends it may pass. */
  hasWorked: boolean
  isGivenUp: boolean
}

export class LocalWorkers {
  readonly #workers: LocalWorker[]
  readonly #restarts = new Set<NodeJS.Timeout>()
  /** A failpoint kills the first process of a worker, not every one that takes its place. */
  readonly #launched = new Set<number>()
  #isClosing = false

  constructor(private readonly options: LocalWorkersOptions) {
    this.#workers = Array.from({ length: options.count }, (_, index) => ({
      index,
      loop: new CrashLoop(options.firstRestartMs),
      child: null,
      hasWorked: false,
      isGivenUp: false,
    }))
  }

  start(): void {
    for (const worker of this.#workers) this.#launch(worker)
  }

  /** Another job begins: it may run where the last one crashed. */
  startAgain(): void {
    for (const worker of this.#workers) {
      worker.loop.progressed()
      if (!worker.isGivenUp) continue
      worker.isGivenUp = false
      this.#launch(worker)
    }
  }

  /** A step has counted the work of this process. */
  progressed(processId: number): void {
    for (const worker of this.#workers) {
      if (worker.child?.pid !== processId) continue
      worker.loop.progressed()
      worker.hasWorked = true
    }
  }

  /** The end of its standard input ends each at once; what does not end in time is killed. */
  async close(): Promise<void> {
    this.#isClosing = true
    for (const timer of this.#restarts) clearTimeout(timer)
    await Promise.all(this.#workers.map(({ child }) => child && endChild(child)))
  }

  #launch(worker: LocalWorker): void {
    const { options } = this
    const { index } = worker
    const workDir = join(options.workDir, `worker-${index + 1}`)
    mkdirSync(workDir, { recursive: true, mode: 0o700 })
    const [node, ...args] = scriptCommand(new URL('../worker/main', import.meta.url))
    const child = spawn(node, [...args, ...this.#argsOf(index, workDir)], {
      stdio: ['pipe', 'pipe', 'inherit'],
      env: options.env,
    })
    const startedMs = performance.now()
    const said = new OutputTail(child.stdout)
    worker.child = child
    child.stdin.on('error', () => {}) // the pipe of a dead child
    child.once('error', (error) => options.log.error({ err: error }, 'a worker did not start'))
    child.once('close', (code, signal) => {
      worker.child = null
      if (this.#isClosing) return
      const error = code === 0 ? null : lastErrorIn(said.text)
      const facts = { worker: index + 1, code, signal }
      if (error !== null && !worker.hasWorked && !mayPass(error)) {
        return this.#giveUp(worker, facts, cannotStart(error))
      }
      // Asked to end, it did: that is no crash.
      const wait =
        code === 0 ? options.firstRestartMs : worker.loop.crashed(performance.now() - startedMs)
      if (wait === null) return this.#giveUp(worker, facts, crashed(facts, error))
      options.log.warn(facts, `worker ended, again in ${wait} ms`)
      const timer = setTimeout(() => {
        this.#restarts.delete(timer)
        this.#launch(worker)
      }, wait)
      this.#restarts.add(timer)
    })
  }

  #giveUp(worker: LocalWorker, facts: Ending, error: TunemeshError): void {
    worker.isGivenUp = true
    this.options.log.error(
      { ...facts, code: error.code, status: facts.code },
      `${error.message} Worker ${facts.worker} is not started again before the next job.`,
    )
    if (this.#workers.every(({ isGivenUp }) => isGivenUp)) this.options.onExhausted(error)
  }

  #argsOf(index: number, workDir: string): string[] {
    const { options } = this
    const args = ['--coordinator', options.coordinator, '--token-file', options.tokenPath]
    args.push('--work-dir', workDir, '--end-with-parent')
    args.push('--threads', String(options.threadsPerWorker))
    args.push('--device', options.device, '--device-index', String(index))
    args.push('--place', `own-${index + 1}`)
    const tuning = options.tuning[index]
    if (tuning === undefined) return args
    args.push('--testing', '--tuning', JSON.stringify(tuning.options ?? {}))
    if (tuning.failpoints && !this.#launched.has(index))
      args.push('--failpoints', tuning.failpoints)
    this.#launched.add(index)
    return args
  }
}

interface Ending {
  /** From 1. */
  worker: number
  code: number | null
  signal: string | null
}

/** Where the user has to mend something, another start ends as this one did. */
const mayPass = (error: TunemeshError) => errorKinds[error.code].exit !== 2

const cannotStart = ({ code, message, details }: TunemeshError) =>
  new TunemeshError(code, `No worker of this machine can start: ${message}`, { details })

function crashed(facts: Ending, error: TunemeshError | null): TunemeshError {
  const end = facts.signal ? `signal ${facts.signal}` : `exit status ${facts.code}`
  const last = error ? `${end}: ${error.code} ${error.message}` : `${end}; its log says more.`
  return new TunemeshError(
    'WORKER_FAILED',
    `No worker of this machine is left: worker ${facts.worker} of this machine crashed ` +
      `${maxCrashes} times in a row, and no step was finished in between. The last ended with ` +
      `${last} Mend that and resume the job.`,
  )
}

async function endChild(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const closed = once(child, 'close')
  child.stdin?.end()
  const timer = setTimeout(() => child.kill('SIGKILL'), endGraceMs)
  await closed
  clearTimeout(timer)
}
