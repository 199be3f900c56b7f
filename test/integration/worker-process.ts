/** One worker as a process of its own, with a folder for what it writes. */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { scriptCommand } from '../../coordinator/script-command.js'
import type { TestCoordinator } from './open-coordinator.js'

export class WorkerProcess {
  readonly child: ChildProcess
  readonly ended: Promise<number | null>
  stderr = ''
  readonly #temporary = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))

  constructor({ ready, stateDir }: Pick<TestCoordinator, 'ready' | 'stateDir'>) {
    const [node, ...args] = scriptCommand(new URL('../../worker/main', import.meta.url))
    const own = ['--coordinator', ready.grpc, '--token-file', join(stateDir, 'token')]
    own.push('--threads', '1', '--end-with-parent')
    this.child = spawn(node, [...args, ...own], {
      stdio: ['pipe', 'ignore', 'pipe'],
      env: { ...process.env, TMPDIR: this.#temporary },
    })
    this.child.stderr?.on('data', (data: Buffer) => {
      this.stderr += data
    })
    this.ended = once(this.child, 'exit').then(([code]) => code as number | null)
  }

  /** Work folders in its temporary folder; what tsx caches there is not ours. */
  workFolders(): string[] {
    return readdirSync(this.#temporary).filter((name) => !name.startsWith('tsx-'))
  }

  removeFolder(): void {
    rmSync(this.#temporary, { recursive: true, force: true })
  }
}
