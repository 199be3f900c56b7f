/** What the page and the coordinator say to each other on the websocket /live, as JSON. */
import type { Job } from './gen/tunemesh/v1/Job.js'
import type { JobEvent } from './gen/tunemesh/v1/JobEvent.js'
import type { WorkerInfo } from './gen/tunemesh/v1/WorkerInfo.js'

/** Fields that are zero, empty or absent may be left out. */
type FeedEvent = JobEvent & { sequence: number; jobId: string; timeMs: number }
type FeedJob = Job & { jobId: string }

export type FromCoordinator =
  /** First message of a connection, and again when a job comes or changes its state. */
  | { type: 'hello'; jobs: FeedJob[]; serverTimeMs: number }
  /** At most ten a second; sequences have no gap within a subscription. */
  | { type: 'events'; jobId: string; events: FeedEvent[] }
  | { type: 'fleet'; workers: WorkerInfo[] }
  /** Each second: proves that the page is not looking at the past. */
  | { type: 'ping'; serverTimeMs: number }

/** The only thing a page says: which job it shows, and the last sequence it has. */
export interface Subscribe {
  type: 'subscribe'
  jobId: string
  afterSequence: number
}
