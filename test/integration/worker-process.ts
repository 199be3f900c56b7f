/** One worker as a process of its own, with a folder for what it writes. */
import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { scriptCommand } from '../../coordinator/script-command.js'
import type { TestCoordinator } from './open-coordinator.js'

export interface WorkerProcessOptions {
  /** Instead of the coordinator's own. */
  token?: string
  /** A command that is to run the worker's. */
  wrapper?: string[]
  args?: string[]
  env?: NodeJS.ProcessEnv
}

export class WorkerProcess {
  readonly child: ChildProcess
  readonly ended: Promise<number | null>
  stderr = ''
  readonly #waiting = new Set<() => void>()
  readonly #temporary = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))

  constructor(
    { ready, stateDir }: Pick<TestCoordinator, 'ready' | 'stateDir'>,
    options: WorkerProcessOptions = {},
  ) {
    const { token, wrapper = [], args: more = [], env = {} } = options
    const worker = scriptCommand(new URL('../../worker/main', import.meta.url))
    const tokenPath = token === undefined ? join(stateDir, 'token') : join(this.#temporary, 'token')
    if (token !== undefined) writeFileSync(tokenPath, token)
    const own = ['--coordinator', ready.grpc, '--token-file', tokenPath]
    own.push('--threads', '1', '--end-with-parent', ...more)
    const [program, ...args] = [...wrapper, ...worker, ...own] as [string, ...string[]]
    this.child = spawn(program, args, {
      stdio: ['pipe', 'ignore', 'pipe'],
      env: { ...process.env, TMPDIR: this.#temporary, ...env },
    })
    this.child.stderr?.on('data', (data: Buffer) => {
      this.stderr += data
      for (const look of this.#waiting) look()
    })
    this.ended = once(this.child, 'exit').then(([code]) => code as number | null)
  }

  /** Resolves once its log holds the pattern; rejects when it ends before. */
  async said(pattern: RegExp): Promise<void> {
    let look = () => {}
    const seen = new Promise<void>((resolve) => {
      look = () => pattern.test(this.stderr) && resolve()
      this.#waiting.add(look)
      look()
    })
    const ended = this.ended.then(() => assert.match(this.stderr, pattern))
    await Promise.race([seen, ended])
    this.#waiting.delete(look)
  }

  /** Its work folders in its temporary folder. */
  workFolders(): string[] {
    return readdirSync(this.#temporary).filter((name) => name.startsWith('tunemesh-'))
  }

  /** Ends it as a kill -9 does, and removes its folder. */
  async discard(): Promise<void> {
    this.child.kill('SIGKILL')
    await this.ended
    this.removeFolder()
  }

  removeFolder(): void {
    rmSync(this.#temporary, { recursive: true, force: true })
  }
}
