/** One job on real processes, killed where a case says, and started again until it ends. */
import { rmSync } from 'node:fs'
import { join } from 'node:path'
import type { JobEvent } from '../../client/client.js'
import { childrenNamed } from '../integration/child-processes.js'
import { TestCoordinator, tinyJob } from '../integration/open-coordinator.js'
import { temporaryFolder } from '../integration/open-nats.js'
import { writePoisonedRow } from '../integration/poisoned-row.js'
import { processesNaming, untilNone } from '../integration/process-session.js'
import { type ChaosCase, chaosLayout, type Life } from './chaos-cases.js'

const maxLives = 5
const caseLimitMs = 120_000

export interface ChaosOutcome {
  state: string
  error: string
  weightsSha256: string
  /** Failpoints at which a process said that it dies. */
  reached: string[]
  hasKilledNats: boolean
  seconds: number
}

export async function runCase(chaos: ChaosCase): Promise<ChaosOutcome> {
  const run = new ChaosRun(chaos)
  const startMs = performance.now()
  try {
    const job = await run.toEnd()
    const error = job?.error ? `${job.error.code} ${job.error.message}` : ''
    const { reached, hasKilledNats } = run
    const { state = 'unknown', weightsSha256 = '' } = job ?? {}
    const seconds = (performance.now() - startMs) / 1000
    return { state, error, weightsSha256, reached, hasKilledNats, seconds }
  } finally {
    await run.removeFiles()
  }
}

/** What every case of the same job must end with; each job's undisturbed run is run once. */
export class UndisturbedRuns {
  readonly #outcomes = new Map<boolean, Promise<ChaosOutcome>>()

  outcomeFor({ hasPoisonedRow }: Pick<ChaosCase, 'hasPoisonedRow'>): Promise<ChaosOutcome> {
    const key = hasPoisonedRow ?? false
    const job = hasPoisonedRow ? { hasPoisonedRow } : {}
    const known = this.#outcomes.get(key)
    const outcome = known ?? runCase({ name: 'undisturbed', lives: [{}], failpoints: [], ...job })
    this.#outcomes.set(key, outcome)
    return outcome
  }
}

/** Empty: the case went as it must. */
export function problemsOf(chaos: ChaosCase, outcome: ChaosOutcome, wanted: string): string[] {
  const problems = chaos.failpoints
    .filter((name) => !outcome.reached.includes(name))
    .map((name) => `${name} was never reached`)
  if (chaos.killNats && !outcome.hasKilledNats) problems.push('nats-server was never killed')
  if (outcome.state !== 'SUCCEEDED') problems.push(`ended ${outcome.state} ${outcome.error}`)
  if (outcome.weightsSha256 !== wanted) problems.push(`weights ${outcome.weightsSha256}`)
  return problems
}

class ChaosRun {
  readonly reached: string[] = []
  hasKilledNats = false
  readonly #folder = temporaryFolder()
  #jobId = ''

  constructor(private readonly chaos: ChaosCase) {}

  async toEnd() {
    for (let life = 0; life < maxLives; life++) {
      const coordinator = await this.#open(this.chaos.lives[life] ?? this.#lastLife())
      try {
        const job = await this.#watch(coordinator)
        if (job) return job
      } finally {
        // Nothing waits for a tidy end: the state folder goes with the case.
        await coordinator.kill()
      }
    }
    return null
  }

  /** After kill -9 of a coordinator its nats-server still writes until its watcher ends it. */
  async removeFiles(): Promise<void> {
    await untilNone(() => processesNaming(this.#folder))
    rmSync(this.#folder, { recursive: true, force: true })
  }

  /** A life beyond those listed: the same devices, no failpoints. */
  #lastLife(): Life {
    const { paths } = this.chaos.lives.at(-1) ?? {}
    return paths ? { paths } : {}
  }

  #open({ coordinator = '', workers = [], paths = [] }: Life): Promise<TestCoordinator> {
    const tuningOf = (index: number) => {
      const instructionPath = paths[index]
      const device = { numThreads: 1, instructionPath, packedCacheDir: null }
      return { failpoints: workers[index] ?? '', options: instructionPath ? { device } : {} }
    }
    // Two classes must share the steps, however slowly one of the workers comes up.
    const limits = { gatherMs: 20_000, firstBackoffMs: 50, longestBackoffMs: 1_000 }
    return TestCoordinator.open({
      workers: 2,
      stateDir: join(this.#folder, 'state'),
      onLog: (line) => this.#noteLine(line),
      tuning: { ...chaosLayout, failpoints: coordinator, workers: [0, 1].map(tuningOf), limits },
    })
  }

  #noteLine(line: string): void {
    const name = /^killed at failpoint (\S+)$/.exec(line)?.[1]
    if (name) this.reached.push(name)
  }

  /** null: the coordinator died before the job had ended. */
  async #watch(coordinator: TestCoordinator) {
    const { client, child } = coordinator
    const gone = new AbortController()
    const timer = setTimeout(() => gone.abort(), caseLimitMs)
    child.once('exit', () => gone.abort())
    try {
      this.#jobId ||= (await client.submit(this.#job())).jobId
      for await (const event of client.watch(this.#jobId, { signal: gone.signal })) {
        this.#maybeKillNats(event, coordinator.ready.pid)
      }
      return gone.signal.aborted ? null : await client.get(this.#jobId)
    } catch (error) {
      if (gone.signal.aborted) return null
      throw error
    } finally {
      clearTimeout(timer)
    }
  }

  #job() {
    const { hasPoisonedRow } = this.chaos
    const poisoned = hasPoisonedRow && {
      ...writePoisonedRow(join(this.#folder, 'model'), 40),
      on_non_finite: 'skip',
    }
    const settings = { max_steps: 8, save_steps: 3, ...this.chaos.settings, ...poisoned }
    return tinyJob(join(this.#folder, 'output'), settings)
  }

  #maybeKillNats(event: JobEvent, root: number): void {
    if (this.hasKilledNats || !this.chaos.killNats?.(event)) return
    const pids = childrenNamed('nats-server', root)
    for (const pid of pids) process.kill(pid, 'SIGKILL')
    this.hasKilledNats = pids.length > 0
  }
}
