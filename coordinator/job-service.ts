/** JobService: what clients ask, in the words of the contract. Decisions lie in job-queue.ts. */
import type { GenerateRequest__Output } from '../proto/gen/tunemesh/v1/GenerateRequest.js'
import type { GenerateResponse } from '../proto/gen/tunemesh/v1/GenerateResponse.js'
import type { JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { JobServiceHandlers } from '../proto/gen/tunemesh/v1/JobService.js'
import type { PlanRequest__Output } from '../proto/gen/tunemesh/v1/PlanRequest.js'
import type { PlanResponse } from '../proto/gen/tunemesh/v1/PlanResponse.js'
import type { WatchRequest__Output } from '../proto/gen/tunemesh/v1/WatchRequest.js'
import type { EventLog } from './event-log.js'
import type { Fleet } from './fleet.js'
import type { JobQueue } from './job-queue.js'
import { endStates, hasEnded, type JobState, type JobStore, jobMessage } from './job-store.js'
import type { ResponseWriter, RpcHandlers } from './rpc-handlers.js'

/** Planning reads, tokenises and packs all rows. */
const longestPlanMs = 10 * 60_000
const defaultListLimit = 100
/** How long the last event of an ended job may still be on its way to the store. */
const lastEventMs = 2_000

export interface JobServiceOptions {
  store: JobStore
  queue: JobQueue
  events: EventLog
  fleet: Fleet
  plan: (request: PlanRequest__Output) => Promise<PlanResponse>
  generate: (
    request: GenerateRequest__Output,
    signal: AbortSignal,
  ) => AsyncIterable<GenerateResponse>
  rpc: RpcHandlers
}

export function jobHandlers(options: JobServiceOptions): JobServiceHandlers {
  const { store, queue, fleet, rpc } = options
  return {
    Submit: rpc.unary(async (request) => jobMessage(await queue.submit(request))),
    Get: rpc.unary(({ jobId }) => jobMessage(store.get(jobId))),
    List: rpc.unary(({ limit }) => ({
      jobs: store
        .list()
        .slice(0, limit > 0 ? limit : defaultListLimit)
        .map(jobMessage),
    })),
    Stop: rpc.unary(async ({ jobId, now }) => jobMessage(await queue.stop(jobId, now))),
    Resume: rpc.unary(async ({ jobId }) => jobMessage(await queue.resume(jobId))),
    Plan: rpc.unary(options.plan, longestPlanMs),
    ListWorkers: rpc.unary(({ withGone }) => ({ workers: fleet.list({ withGone }) })),
    Watch: rpc.serverStream((request: WatchRequest__Output, out: ResponseWriter<JobEvent>) =>
      watch(options, request, out),
    ),
    Generate: rpc.serverStream(
      async (request: GenerateRequest__Output, out: ResponseWriter<GenerateResponse>) => {
        for await (const piece of options.generate(request, out.signal)) await out.write(piece)
      },
    ),
  }
}

async function watch(
  { store, events }: JobServiceOptions,
  request: WatchRequest__Output,
  out: ResponseWriter<JobEvent>,
): Promise<void> {
  store.get(request.jobId)
  let state: JobState | null = null
  let lastSequence = request.afterSequence
  // The record says that it ended; its last event may be a moment behind, or lost with a
  // coordinator.
  const done = new AbortController()
  let timer: NodeJS.Timeout | undefined
  const endSoon = () => {
    clearTimeout(timer)
    if (request.followForever || !hasEnded(store.get(request.jobId))) return
    timer = setTimeout(() => done.abort(), lastEventMs)
  }
  const signal = AbortSignal.any([out.signal, done.signal])
  const check = setInterval(endSoon, lastEventMs * 2)
  endSoon()
  try {
    for await (const batch of events.subscribe(request.jobId, lastSequence, signal)) {
      for (const event of batch) {
        await out.write(event)
        lastSequence = event.sequence
        state = (event.stateChanged?.state as JobState | undefined) ?? state
      }
      clearTimeout(timer)
      const isLast = await events.isLast(request.jobId, lastSequence)
      const isOver = isLast && state !== null && endStates.includes(state)
      if (isOver && !request.followForever && hasEnded(store.get(request.jobId))) return
      endSoon()
    }
  } finally {
    clearTimeout(timer)
    clearInterval(check)
  }
}
