/**
 * A job's events over any number of connections, without a gap or a duplicate.
 *
 * The sequence number is the cursor. A connection that breaks is opened again after the last
 * sequence seen; what arrives twice is dropped, and a hole ends the connection at once.
 */
import { TunemeshError } from '../proto/errors.js'
import type { JobEvent__Output as JobEvent } from '../proto/gen/tunemesh/v1/JobEvent.js'
import type { JobState__Output as JobState } from '../proto/gen/tunemesh/v1/JobState.js'
import {
  backoffMs,
  defaultRetryPolicy,
  isPassing,
  type RetryPolicy,
  realSurroundings,
  type Surroundings,
} from './retry.js'

const isFinalState = (state: JobState): boolean =>
  state === 'SUCCEEDED' || state === 'FAILED' || state === 'STOPPED'

export interface WatchSource {
  /** Events after `afterSequence`, until the server ends the stream. */
  open(afterSequence: number): AsyncIterable<JobEvent>
  /** The job's state now: tells the end of a job from a server that went away politely. */
  stateNow(): Promise<JobState>
}

export interface WatchOptions {
  afterSequence?: number
  followForever?: boolean
  signal?: AbortSignal | undefined
  /** How often, in a row and without one new event, a connection may fail. */
  policy?: RetryPolicy
  surroundings?: Surroundings
  onReconnect?: ((error: TunemeshError) => void) | undefined
}

// A coordinator that restarts needs some seconds; 40 attempts under a cap of 2 s wait about a
// minute.
const watchPolicy: RetryPolicy = { ...defaultRetryPolicy, maxAttempts: 40 }

export async function* watchEvents(
  source: WatchSource,
  options: WatchOptions = {},
): AsyncGenerator<JobEvent, void, undefined> {
  const policy = options.policy ?? watchPolicy
  const surroundings = options.surroundings ?? realSurroundings
  let last = options.afterSequence ?? 0
  let failures = 0
  let isFinal = false
  for (;;) {
    const before = last
    try {
      for await (const event of source.open(last)) {
        if (event.sequence <= last) continue
        if (event.sequence > last + 1) throw gapError(last, event.sequence)
        last = event.sequence
        failures = 0
        if (event.event === 'stateChanged' && event.stateChanged) {
          isFinal = isFinalState(event.stateChanged.state)
        }
        yield event
      }
      if (!options.followForever) {
        if (isFinal) return
        if (last === before && isFinalState(await source.stateNow())) return
      }
      failures++
    } catch (error) {
      if (!isPassing(error)) throw error
      failures++
      if (failures >= policy.maxAttempts) throw error
      options.onReconnect?.(error)
    }
    if (failures > 0) {
      if (failures >= policy.maxAttempts) throw endedError(last)
      await surroundings.wait(backoffMs(policy, failures, surroundings.random()), options.signal)
    }
  }
}

const gapError = (last: number, got: number) =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `The event stream jumped from sequence ${last} to ${got}. Reading again from ${last}.`,
  )

const endedError = (last: number) =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `The coordinator keeps ending the event stream after sequence ${last} while the job goes on. ` +
      'Look at its log, then watch again.',
  )
