/**
 * A coordinator of its own for a test: a real process with real workers on a temporary state
 * folder.
 */
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Readable } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { connect, type JoinLine, type TunemeshClient } from '../../client/client.js'
import { scriptCommand } from '../../coordinator/script-command.js'
import { natsBinary, temporaryFolder } from './open-nats.js'

export interface CoordinatorOptions {
  workers?: number
  tuning?: object
  /** HOST:PORT where joined workers come in by TLS; default: loopback only, plain text. */
  listen?: string
  /** State folder of an earlier one; default: a new one. */
  stateDir?: string
  /** Each line of its log; the workers' lines are among them. */
  onLog?: (line: string) => void
}

export interface ReadyLine {
  ready: boolean
  grpc: string
  token: string
  dashboard: string
  pid: number
  join: JoinLine | null
  error?: { code: string; message: string }
}

export class TestCoordinator {
  private constructor(
    readonly child: ChildProcess,
    readonly ready: ReadyLine,
    readonly stateDir: string,
    readonly client: TunemeshClient,
  ) {}

  static async open(options: CoordinatorOptions = {}): Promise<TestCoordinator> {
    const stateDir = options.stateDir ?? temporaryFolder()
    const { child, ready } = await launch(stateDir, options)
    assert.deepEqual(ready.error, undefined)
    const client = connect({ address: ready.grpc, token: ready.token })
    return new TestCoordinator(child, ready, stateDir, client)
  }

  /** Resolves when the process has ended by itself. */
  async ended(): Promise<void> {
    if (this.child.exitCode === null && this.child.signalCode === null) {
      await once(this.child, 'exit')
    }
    this.client.close()
  }

  async kill(): Promise<void> {
    this.child.kill('SIGKILL')
    await this.ended()
  }

  /** As when its parent has gone. */
  async close(): Promise<void> {
    this.child.stdin?.end()
    await this.ended()
  }

  removeState(): void {
    rmSync(this.stateDir, { recursive: true, force: true })
  }
}

/** The first line it says, whether it came up or not. */
export async function launch(stateDir: string, options: CoordinatorOptions) {
  const [node, ...args] = scriptCommand(new URL('../../coordinator/main', import.meta.url))
  const own = ['--state-dir', stateDir, '--end-with-parent', '--nats-server', await natsBinary()]
  own.push('--workers', String(options.workers ?? 0), '--threads-per-worker', '1')
  if (options.listen) own.push('--listen', options.listen)
  own.push('--testing', '--tuning', JSON.stringify(options.tuning ?? {}))
  const log = process.env.TUNEMESH_TEST_LOG ? 'inherit' : options.onLog ? 'pipe' : 'ignore'
  const child = spawn(node, [...args, ...own], { stdio: ['pipe', 'pipe', log] })
  child.stdin?.on('error', () => {}) // the pipe of one that was killed
  if (child.stderr && options.onLog) {
    createInterface({ input: child.stderr }).on('line', options.onLog)
  }
  const [line] = (await once(createInterface({ input: child.stdout as Readable }), 'line')) as [
    string,
  ]
  return { child, ready: JSON.parse(line) as ReadyLine }
}

/** The tiny model's folder in the source tree, also when the tests run from build/. */
export const examplesDir = fileURLToPath(
  new URL(
    import.meta.url.includes('/build/test/') ? '../../../examples' : '../../examples',
    import.meta.url,
  ),
)

/** A job of the tiny model that takes a few seconds; `outputDir` must not exist. */
export const tinyJob = (outputDir: string, settings: Record<string, unknown> = {}) => ({
  jobFile: Object.entries({
    model: join(examplesDir, 'tiny-llama'),
    data: join(examplesDir, 'tiny-llama', 'rows.jsonl'),
    output_dir: outputDir,
    max_length: 64,
    max_steps: 12,
    gradient_accumulation_steps: 6,
    save_steps: 4,
    ...settings,
  })
    .map(([key, value]) => `${key}: ${JSON.stringify(value)}`)
    .join('\n'),
  jobFileName: 'job.yaml',
  baseDir: '/',
})
