/** The messages of proto/live-feed.ts as they arrive: JSON, so every number is a plain number. */
import type { Job__Output } from '../proto/gen/tunemesh/v1/Job.js'
import type { JobEvent__Output } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { WorkerInfo__Output } from '../proto/gen/tunemesh/v1/WorkerInfo.js'
import type * as sent from '../proto/live-feed.js'

export type { Subscribe } from '../proto/live-feed.js'

/** What is zero, empty or absent may be left out. */
type Sparse<T> = T extends (infer Item)[]
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

type Arrived<Message> = Message extends { type: 'hello' }
  ? Omit<Message, 'jobs'> & { jobs: FeedJob[] }
  : Message extends { type: 'events' }
    ? Omit<Message, 'events'> & { events: FeedEvent[] }
    : Message extends { type: 'fleet' }
      ? Omit<Message, 'workers'> & { workers: FeedWorker[] }
      : Message

export type FromCoordinator = Arrived<sent.FromCoordinator>
