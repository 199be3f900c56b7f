/** Runs the command line as a user does: a process, its output, its signals. */
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { extname } from 'node:path'
import { fileURLToPath } from 'node:url'

const extension = extname(fileURLToPath(import.meta.url))
const main = fileURLToPath(new URL(`../../cli/main${extension}`, import.meta.url))
const loader = extension === '.ts' ? ['--import', 'tsx'] : []
/** In an unpacked bundle the program that its users start. */
const bundled = ['node', 'tunemesh'].map((name) =>
  fileURLToPath(new URL(`../../../../${name}`, import.meta.url)),
)
const program = bundled.every((path) => existsSync(path))
  ? bundled.slice(1)
  : [process.execPath, ...loader, main]

export interface CliResult {
  code: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

export class CliProcess {
  readonly child: ChildProcess
  readonly ended: Promise<CliResult>
  stdout = ''
  stderr = ''
  readonly #waiting = new Set<() => void>()

  /** @param wrapper a command that is to run the program's */
  constructor(args: string[], env: NodeJS.ProcessEnv = {}, wrapper: string[] = []) {
    const command = [...wrapper, ...program, ...args]
    const [first, ...rest] = command as [string, ...string[]]
    this.child = spawn(first, rest, {
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, NO_COLOR: '1', ...env },
    })
    this.child.stdout?.on('data', (data: Buffer) => {
      this.stdout += data
      for (const look of this.#waiting) look()
    })
    this.child.stderr?.on('data', (data: Buffer) => {
      this.stderr += data
      for (const look of this.#waiting) look()
    })
    this.ended = new Promise((resolve) => {
      this.child.once('close', (code, signal) => {
        resolve({ code, signal, stdout: this.stdout, stderr: this.stderr })
        for (const look of this.#waiting) look()
      })
    })
  }

  /** Resolves once stdout or stderr holds the pattern; rejects when the process ends before. */
  until(pattern: RegExp): Promise<void> {
    return new Promise((resolve, reject) => {
      const look = () => {
        if (pattern.test(this.stdout) || pattern.test(this.stderr)) resolve()
        else if (this.child.exitCode !== null) {
          reject(new Error(`ended without ${pattern}:\n${this.stdout}\n${this.stderr}`))
        } else return
        this.#waiting.delete(look)
      }
      this.#waiting.add(look)
      look()
    })
  }

  interrupt(): void {
    this.child.kill('SIGINT')
  }
}

export const runCli = (args: string[], env: NodeJS.ProcessEnv = {}): Promise<CliResult> =>
  new CliProcess(args, env).ended

export function jsonLines(text: string): Record<string, unknown>[] {
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line) as Record<string, unknown>)
}
