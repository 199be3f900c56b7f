/** What the page and the coordinator say to each other on /live. */
import type { Job__Output } from '../proto/gen/tunemesh/v1/Job.js'
import type { JobEvent__Output } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { WorkerInfo__Output } from '../proto/gen/tunemesh/v1/WorkerInfo.js'

/** As values come in JSON: what is zero, empty or absent may be left out. */
export type Sparse<T> = T extends (infer Item)[]
  ? Sparse<Item>[]
  : T extends object
    ? { [Key in keyof T]?: Sparse<T[Key]> | null }
    : T

export type FeedEvent = Sparse<JobEvent__Output> & {
  sequence: number
  jobId: string
  timeMs: number
}
export type FeedJob = Sparse<Job__Output> & { jobId: string }
export type FeedWorker = Sparse<WorkerInfo__Output>

export type FromCoordinator =
  | { type: 'hello'; jobs: FeedJob[]; serverTimeMs: number }
  | { type: 'events'; jobId: string; events: FeedEvent[] }
  | { type: 'fleet'; workers: FeedWorker[] }
  | { type: 'ping'; serverTimeMs: number }

export interface Subscribe {
  type: 'subscribe'
  jobId: string
  afterSequence: number
}
