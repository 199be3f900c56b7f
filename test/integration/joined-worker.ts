/** A worker of another host, as a user starts it: a command line with a state folder of its own. */
import assert from 'node:assert/strict'
import type { JoinLine } from '../../client/client.js'
import { CliProcess, type CliResult } from './cli-process.js'
import type { TestCoordinator } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'

export class JoinedWorker {
  readonly process: CliProcess

  /** @param token null: the host has joined before, or tries to get by without */
  constructor(
    url: string,
    token: string | null,
    readonly stateDir = temporaryFolder(),
    args: string[] = [],
  ) {
    const way = token === null ? [] : ['--token', token]
    const own = ['--state-dir', stateDir, '--threads', '1', '--device', 'cpu']
    this.process = new CliProcess(['worker', '--join', url, ...way, ...own, ...args])
  }

  /** It leaves as at a Ctrl-C. */
  async leave(): Promise<CliResult> {
    this.process.interrupt()
    return this.process.ended
  }
}

export function joinLineOf({ ready }: TestCoordinator): JoinLine {
  assert.ok(ready.join !== null)
  return ready.join
}

/** HOST:PORT of a join line. */
export const addressIn = ({ url }: JoinLine): string => url.replace('https://', '')

/** What it said where it left with exit 2: something that the user can mend. */
export async function refusal(worker: JoinedWorker): Promise<string> {
  const { code, stderr } = await worker.process.ended
  assert.equal(code, 2, stderr)
  return stderr
}

/** Asks until so many are attached; the test's own time limit ends a wait for nothing. */
export async function attached({ client }: TestCoordinator, count: number) {
  for (;;) {
    const workers = await client.listWorkers()
    if (workers.length === count) return workers.map(({ workerId }) => workerId).sort()
  }
}
