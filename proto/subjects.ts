/**
 * NATS subjects and streams. Core NATS carries frames and credits, JetStream the commit log and job
 * events.
 */

/** One stream for all jobs' commit subjects: compare-and-set on a subject's last sequence. */
export const commitStream = 'TM_COMMITS'
export const commitSubject = (job: string) => `tm.commit.${job}`

/** Job events; the dashboard, Watch and `logs` read it from any sequence. */
export const eventStream = 'TM_EVENTS'
export const eventSubject = (job: string) => `tm.event.${job}`

interface SliceAddress {
  job: string
  fleetEpoch: number
  slice: number
  sliceAttempt: number
}

/**
 * A contribution's frames for one slice. Only the current owner subscribes, under the current fleet
 * epoch and slice attempt: what a zombie sends has no interest and dies at the server.
 */
export const contributionSubject = (a: SliceAddress) =>
  `tm.g.${a.job}.${a.fleetEpoch}.c.${a.slice}.${a.sliceAttempt}`
/** A slice's published sum: every worker of the job subscribes to all slices of the epoch. */
export const sumSubject = (a: SliceAddress) =>
  `tm.g.${a.job}.${a.fleetEpoch}.s.${a.slice}.${a.sliceAttempt}`
export const allSumsSubject = (job: string, fleetEpoch: number) => `tm.g.${job}.${fleetEpoch}.s.*.*`
/** Credits, acknowledgements and requests to send again, addressed to one worker. */
export const creditSubject = (job: string, fleetEpoch: number, worker: string) =>
  `tm.g.${job}.${fleetEpoch}.k.${worker}`

/** The last state of each job; one message a subject is kept. */
export const jobStream = 'TM_JOBS'
export const jobSubject = (job: string) => `tm.job.${job}`
