/**
 * Workers of this machine: child processes, started again with back-off when they crash, ended with
 * us.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import type { Logger } from 'pino'
import { scriptCommand } from './script-command.js'

const firstDelayMs = 200
const longestDelayMs = 30_000
/** A worker that ran so long before it died starts again without delay. */
const healthyMs = 60_000
const endGraceMs = 8_000

export interface LocalWorkersOptions {
  count: number
  threadsPerWorker: number
  coordinator: string
  tokenPath: string
  /** A folder for each worker is made in it. */
  workDir: string
  /** Environment of the workers: nothing secret is in it. */
  env: NodeJS.ProcessEnv
  /** Test knobs by worker; the options reach a worker only with --testing. */
  tuning: { failpoints?: string; options?: Record<string, unknown> }[]
  log: Logger
}

/** The processors divided: more threads than processors make every worker slower. */
export function threadsEach(numWorkers: number, numProcessors: number): number {
  return Math.max(1, Math.floor(numProcessors / Math.max(1, numWorkers)))
}

export class LocalWorkers {
  readonly #children = new Set<ChildProcess>()
  readonly #restarts = new Set<NodeJS.Timeout>()
  /** A failpoint kills the first process of a worker, not every one that takes its place. */
  readonly #launched = new Set<number>()
  #isClosing = false

  constructor(private readonly options: LocalWorkersOptions) {}

  start(): void {
    for (let index = 0; index < this.options.count; index++) this.#launch(index, firstDelayMs)
  }

  /** The end of its standard input ends each at once; what does not end in time is killed. */
  async close(): Promise<void> {
    this.#isClosing = true
    for (const timer of this.#restarts) clearTimeout(timer)
    await Promise.all([...this.#children].map((child) => endChild(child)))
  }

  #launch(index: number, delayMs: number): void {
    const { options } = this
    const workDir = join(options.workDir, `worker-${index + 1}`)
    mkdirSync(workDir, { recursive: true, mode: 0o700 })
    const [node, ...args] = scriptCommand(new URL('../worker/main', import.meta.url))
    const child = spawn(node, [...args, ...this.#argsOf(index, workDir)], {
      stdio: ['pipe', 'ignore', 'inherit'],
      env: options.env,
    })
    const startedMs = performance.now()
    this.#children.add(child)
    child.stdin.on('error', () => {}) // the pipe of a dead child
    child.once('error', (error) => options.log.error({ err: error }, 'a worker did not start'))
    child.once('close', (code, signal) => {
      this.#children.delete(child)
      if (this.#isClosing) return
      const wait = performance.now() - startedMs > healthyMs ? firstDelayMs : delayMs
      options.log.warn({ worker: index + 1, code, signal }, `worker ended, again in ${wait} ms`)
      const timer = setTimeout(() => {
        this.#restarts.delete(timer)
        this.#launch(index, Math.min(wait * 2, longestDelayMs))
      }, wait)
      this.#restarts.add(timer)
    })
  }

  #argsOf(index: number, workDir: string): string[] {
    const { options } = this
    const args = ['--coordinator', options.coordinator, '--token-file', options.tokenPath]
    args.push('--work-dir', workDir, '--end-with-parent')
    args.push('--threads', String(options.threadsPerWorker))
    const tuning = options.tuning[index]
    if (tuning === undefined) return args
    args.push('--testing', '--tuning', JSON.stringify(tuning.options ?? {}))
    if (tuning.failpoints && !this.#launched.has(index))
      args.push('--failpoints', tuning.failpoints)
    this.#launched.add(index)
    return args
  }
}

async function endChild(child: ChildProcess): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return
  const closed = once(child, 'close')
  child.stdin?.end()
  const timer = setTimeout(() => child.kill('SIGKILL'), endGraceMs)
  await closed
  clearTimeout(timer)
}
