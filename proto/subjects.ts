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
 * A contribution's frames for one slice, addressed to its owner. Only the current owner subscribes,
 * under the current fleet epoch and slice attempt: what a zombie sends has no interest and dies at
 * the server.
 */
export const contributionSubject = (a: SliceAddress & { ownerWorkerId: string }) =>
  `tm.g.${a.job}.${a.fleetEpoch}.c.${a.ownerWorkerId}.${a.slice}.${a.sliceAttempt}`
/** A slice's published sum: every worker of the job subscribes to all slices of the epoch. */
export const sumSubject = (a: SliceAddress) =>
  `tm.g.${a.job}.${a.fleetEpoch}.s.${a.slice}.${a.sliceAttempt}`
export const allSumsSubject = (job: string, fleetEpoch: number) => `tm.g.${job}.${fleetEpoch}.s.*.*`
/** Credits, acknowledgements and requests to send again, addressed to one worker. */
export const creditSubject = (job: string, fleetEpoch: number, worker: string) =>
  `tm.g.${job}.${fleetEpoch}.k.${worker}`

/** Every message of the three kinds above ends with its sender, which the server holds it to. */
export const sentBy = (subject: string, worker: string) => `${subject}.${worker}`
export const sentByAnyone = (subject: string) => `${subject}.*`
export const senderOf = (subject: string) => subject.slice(subject.lastIndexOf('.') + 1)

/** Replies to requests: each user has a prefix of its own, which no other may read. */
export const inboxPrefix = (user: string) => `_INBOX_${user}`

/** All that a worker's user may do, as nats-server checks. Reading commits is its one request. */
export const workerPermissions = (worker: string) => ({
  publish: [
    sentBy('tm.g.*.*.c.*.*.*', worker),
    sentBy('tm.g.*.*.s.*.*', worker),
    sentBy('tm.g.*.*.k.*', worker),
    `$JS.API.DIRECT.GET.${commitStream}`,
  ],
  subscribe: [
    `tm.g.*.*.c.${worker}.*.*.*`,
    'tm.g.*.*.s.*.*.*',
    `tm.g.*.*.k.${worker}.*`,
    `${inboxPrefix(worker)}.>`,
  ],
})

/** The last state of each job; one message a subject is kept. */
export const jobStream = 'TM_JOBS'
export const jobSubject = (job: string) => `tm.job.${job}`
