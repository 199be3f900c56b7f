/** Questions to a worker beside any job: what a job would need, and text from a model. */
import { randomUUID } from 'node:crypto'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { ErrorInfo__Output } from '../proto/gen/tunemesh/v1/ErrorInfo.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { GenerateCall } from '../proto/gen/tunemesh/v1/GenerateCall.js'
import type { GenerateResult__Output } from '../proto/gen/tunemesh/v1/GenerateResult.js'
import type { PlanCall } from '../proto/gen/tunemesh/v1/PlanCall.js'
import type { PlanResult__Output } from '../proto/gen/tunemesh/v1/PlanResult.js'
import type { Fleet, FleetWorker } from './fleet.js'

/** Silence of a worker after which a question counts as unanswered. */
const answerTimeoutMs = 120_000
/** Tokens that a slow reader may leave unread; one generation has fewer. */
const maxUnreadResults = 100_000

export interface WorkerWanted {
  waitMs: number
  signal?: AbortSignal | undefined
  /** Which ones will do; by default all. */
  isAble?: (worker: FleetWorker) => boolean
  /** Which one is taken where several are idle. */
  prefers?: (worker: FleetWorker) => boolean
}

/** Resolves with an attached worker, the idlest one; waits for one to come. */
export async function anyWorker(fleet: Fleet, wanted: WorkerWanted) {
  const { waitMs, signal, isAble = () => true, prefers = () => true } = wanted
  const able = fleet.workers.filter(isAble)
  const found = idlest([...able.filter(prefers), ...able.filter((worker) => !prefers(worker))])
  if (found !== null) return found
  if (fleet.exhausted) fleet.want()
  return new Promise<FleetWorker>((resolve, reject) => {
    const settle = (act: () => void) => {
      clearTimeout(timer)
      fleet.off('attached', onAttached)
      fleet.off('exhausted', onExhausted)
      signal?.removeEventListener('abort', onAbort)
      act()
    }
    const onAttached = (worker: FleetWorker) => {
      if (isAble(worker)) settle(() => resolve(worker))
    }
    const onExhausted = (error: Error) => settle(() => reject(error))
    const onAbort = () => settle(() => reject(stopped()))
    const timer = setTimeout(() => settle(() => reject(noWorkers(waitMs))), waitMs)
    fleet.on('attached', onAttached)
    fleet.on('exhausted', onExhausted)
    signal?.addEventListener('abort', onAbort)
    if (signal?.aborted) onAbort()
  })
}

/**
 * One that may load a model beside the plan of any job: a job's memory is counted without it.
 * @throws TunemeshError STATE_CONFLICT when all attached workers train
 */
export async function idleWorker(fleet: Fleet, wanted: WorkerWanted) {
  const worker = await anyWorker(fleet, wanted)
  if (worker.state === 'idle') return worker
  const job = worker.jobId === '' ? 'the job that runs' : `job ${worker.jobId}`
  throw new TunemeshError(
    'STATE_CONFLICT',
    `All workers train, ${fleet.workers.length} of them, and have no memory for another model. ` +
      `Ask again after ${job}, or attach another worker: tunemesh worker.`,
  )
}

export async function askPlan(
  fleet: Fleet,
  worker: FleetWorker,
  question: Omit<PlanCall, 'callId'>,
): Promise<PlanResult__Output> {
  const callId = randomUUID()
  const answers = answersOf(fleet, worker, (message) =>
    message.planResult?.callId === callId ? message.planResult : null,
  )
  worker.stream.send({ planCall: { ...question, callId } })
  for await (const result of answers) {
    if (result.error?.code) throw errorOf(result.error)
    return result
  }
  throw stopped()
}

/** Results until `done`; leaving the loop early cancels the generation. */
export async function* askGenerate(
  fleet: Fleet,
  worker: FleetWorker,
  question: Omit<GenerateCall, 'callId'>,
): AsyncGenerator<GenerateResult__Output> {
  const callId = randomUUID()
  let isDone = false
  const answers = answersOf(fleet, worker, (message) =>
    message.generateResult?.callId === callId ? message.generateResult : null,
  )
  worker.stream.send({ generateCall: { ...question, callId } })
  try {
    for await (const result of answers) {
      isDone = result.done || Boolean(result.error?.code)
      if (result.error?.code) throw errorOf(result.error)
      yield result
      if (isDone) return
    }
  } finally {
    if (!isDone) fleet.send(worker.id, { generateCall: { callId, cancel: true } })
  }
}

/** Matching messages of one worker; fails when it is lost or silent for too long. */
async function* answersOf<Answer>(
  fleet: Fleet,
  worker: FleetWorker,
  pick: (message: FromWorker__Output) => Answer | null,
): AsyncGenerator<Answer> {
  const waiting: Answer[] = []
  let failure: TunemeshError | null = null
  let wake = () => {}
  const onMessage = (from: FleetWorker, message: FromWorker__Output) => {
    const answer = from.id === worker.id ? pick(message) : null
    if (answer === null || waiting.length >= maxUnreadResults) return
    waiting.push(answer)
    wake()
  }
  const onLost = (lost: FleetWorker, reason: string) => {
    if (lost !== worker) return
    failure = new TunemeshError('WORKER_FAILED', `Worker ${worker.id} was lost: ${reason}.`)
    wake()
  }
  fleet.on('message', onMessage)
  fleet.on('lost', onLost)
  try {
    for (;;) {
      const next = waiting.shift()
      if (next !== undefined) {
        yield next
        continue
      }
      if (failure !== null) throw failure
      const timer = setTimeout(() => {
        const text = `Worker ${worker.id} did not answer within ${answerTimeoutMs / 1000} s.`
        failure = new TunemeshError('DEADLINE_EXCEEDED', text)
        wake()
      }, answerTimeoutMs)
      await new Promise<void>((resolve) => {
        wake = resolve
      })
      clearTimeout(timer)
    }
  } finally {
    fleet.off('message', onMessage)
    fleet.off('lost', onLost)
  }
}

function idlest(all: FleetWorker[]): FleetWorker | null {
  const workers = all.filter((worker) => worker.state !== 'draining')
  return workers.find((worker) => worker.state === 'idle') ?? workers[0] ?? null
}

const errorOf = (info: ErrorInfo__Output) =>
  new TunemeshError(isErrorCode(info.code) ? info.code : 'ENGINE_FAILED', info.message, {
    details: info.details,
  })

const noWorkers = (waitMs: number) =>
  new TunemeshError(
    'NO_WORKERS',
    `No worker attached within ${waitMs / 1000} s. Start one: tunemesh worker --join ADDRESS.`,
  )

const stopped = () => new TunemeshError('JOB_STOPPED', 'Stopped while waiting for a worker.')
