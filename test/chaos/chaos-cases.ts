/**
 * Every kill that a job must survive: each failpoint of proto/PROTOCOL.md §9, and nats-server at
 * the job's turning points.
 */
import type { JobEvent } from '../../client/client.js'

/** What one coordinator is started with; the one after its death gets the next. */
export interface Life {
  coordinator?: string
  workers?: string[]
  /** Instruction path by worker: other paths are other device classes. */
  paths?: ('avx2' | 'generic')[]
}

export interface ChaosCase {
  name: string
  lives: Life[]
  /** Each must be reached at least once. */
  failpoints: string[]
  /** nats-server is killed at the first event for which this is true. */
  killNats?: (event: JobEvent) => boolean
  /** Of the job file; none that would change the weights. */
  settings?: { save_steps: number }
  /** A row makes steps end as skipped: another job, with its own undisturbed weights. */
  hasPoisonedRow?: true
}

/** Every slice of the job's vector takes two calls of the publisher: see worker.mid-publish. */
export const chaosLayout = { sliceBlocks: 24, chunkBlocks: 3 }

/** Count at which each fails: in the middle of the job, after its first checkpoint where it can. */
const workerCounts = {
  'worker.before-apply': 5,
  'worker.after-apply': 5,
  'worker.before-publish': 20,
  'worker.mid-publish': 20,
  'worker.after-publish': 20,
  'worker.before-contribution': 30,
  'worker.before-lease-done': 5,
  'worker.after-lease-done': 5,
}
/** Whichever worker is asked for these dies, and then the other. */
const askedOfOne = {
  'worker.before-upload': 1,
  'worker.after-upload': 1,
  'worker.before-deliver': 1,
  'worker.after-deliver': 1,
}
const coordinatorCounts = {
  'coordinator.before-append-epoch': 2,
  'coordinator.after-append-epoch': 2,
  'coordinator.before-append-commit': 5,
  'coordinator.after-append-commit': 5,
  'coordinator.before-append-checkpoint': 1,
  'coordinator.after-append-checkpoint': 1,
  'coordinator.before-manifest': 1,
  'coordinator.after-manifest': 1,
  'coordinator.before-output': 1,
  'coordinator.after-output': 1,
}

const workerCases = (counts: Record<string, number>, who: 'one' | 'both'): ChaosCase[] =>
  Object.entries(counts).map(([failpoint, count]) => {
    const spec = `${failpoint}:${count}`
    const workers = who === 'both' ? [spec, spec] : [spec]
    return { name: `${failpoint} (${who})`, lives: [{ workers }], failpoints: [failpoint] }
  })

const coordinatorCases = Object.entries(coordinatorCounts).map(
  ([failpoint, count]): ChaosCase => ({
    name: failpoint,
    lives: [{ coordinator: `${failpoint}:${count}` }],
    failpoints: [failpoint],
  }),
)

/**
 * Steps were shared by two device classes; the next coordinator has one of
 * them only, so it rolls back, and dies at it.
 */
const rollbackCases = ['before', 'after'].map((side): ChaosCase => {
  const failpoint = `coordinator.${side}-append-rollback`
  const paths: Life['paths'] = ['avx2', 'avx2']
  return {
    name: failpoint,
    lives: [
      { coordinator: 'coordinator.after-append-commit:5', paths: ['avx2', 'generic'] },
      { coordinator: `${failpoint}:1`, paths },
      { paths },
    ],
    failpoints: ['coordinator.after-append-commit', failpoint],
    // The slow one soon has no share, but the first step is not in a checkpoint.
    settings: { save_steps: 0 },
  }
})

const skipCases = ['before', 'after'].map((side): ChaosCase => {
  const failpoint = `coordinator.${side}-append-skip`
  return {
    name: failpoint,
    lives: [{ coordinator: `${failpoint}:1` }],
    failpoints: [failpoint],
    hasPoisonedRow: true,
  }
})

const natsKills: { name: string; killNats: (event: JobEvent) => boolean }[] = [
  { name: 'nats-server after step 1', killNats: (event) => event.step?.step === 1 },
  { name: 'nats-server after step 5', killNats: (event) => event.step?.step === 5 },
  { name: 'nats-server at a checkpoint', killNats: (event) => event.checkpoint != null },
  { name: 'nats-server after the last step', killNats: (event) => event.step?.step === 8 },
]
const natsCases = natsKills.map((kill): ChaosCase => ({ lives: [{}], failpoints: [], ...kill }))

const everyone: ChaosCase = {
  name: 'a worker, then the coordinator, then a worker of the next',
  lives: [
    { coordinator: 'coordinator.after-append-commit:4', workers: ['worker.mid-publish:9'] },
    { workers: ['', 'worker.before-apply:2'] },
  ],
  failpoints: ['worker.mid-publish', 'coordinator.after-append-commit', 'worker.before-apply'],
}

export const chaosCases: ChaosCase[] = [
  ...workerCases(workerCounts, 'one'),
  ...workerCases(workerCounts, 'both'),
  ...workerCases(askedOfOne, 'both'),
  ...coordinatorCases,
  ...rollbackCases,
  ...skipCases,
  ...natsCases,
  everyone,
]
