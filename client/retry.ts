/** The one place where a call is sent again: capped, jittered, and only for failures that pass. */
import { reconnectDelayMs } from '../proto/backoff.js'
import { errorKinds, TunemeshError } from '../proto/errors.js'

export interface RetryPolicy {
  maxAttempts: number
  firstDelayMs: number
  maxDelayMs: number
}

export const defaultRetryPolicy: RetryPolicy = {
  maxAttempts: 6,
  firstDelayMs: 100,
  maxDelayMs: 2_000,
}

/** Time and chance, passed in so that tests can hold both still. */
export interface Surroundings {
  wait(ms: number, signal?: AbortSignal): Promise<void>
  random(): number
}

export const realSurroundings: Surroundings = {
  wait: (ms, signal) =>
    new Promise((resolve, reject) => {
      if (signal?.aborted) {
        reject(abortReason(signal))
        return
      }
      const abort = () => {
        clearTimeout(timer)
        reject(abortReason(signal))
      }
      const timer = setTimeout(() => {
        signal?.removeEventListener('abort', abort)
        resolve()
      }, ms)
      signal?.addEventListener('abort', abort, { once: true })
    }),
  random: Math.random,
}

/** Half jitter: anything between half and the whole of first · 2^attempt, capped. */
export function backoffMs(policy: RetryPolicy, failedAttempts: number, random: number): number {
  const ceiling = Math.min(
    policy.maxDelayMs,
    policy.firstDelayMs * 2 ** Math.min(failedAttempts - 1, 20),
  )
  return ceiling * (0.5 + random / 2)
}

export const isPassing = (error: unknown): error is TunemeshError =>
  error instanceof TunemeshError && errorKinds[error.code].retry

/** Runs an idempotent call until it answers, fails for good, or the attempts are used up. */
export async function withRetries<T>(
  call: (attempt: number) => Promise<T>,
  policy: RetryPolicy = defaultRetryPolicy,
  surroundings: Surroundings = realSurroundings,
): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call(attempt)
    } catch (error) {
      if (!isPassing(error) || attempt >= policy.maxAttempts) throw error
      await surroundings.wait(backoffMs(policy, attempt, surroundings.random()))
    }
  }
}

export interface Patience {
  patienceMs: number
  signal?: AbortSignal | undefined
  nowMs?: () => number
  /** @param failures in a row */
  onFailure?: (error: TunemeshError, failures: number) => void
}

/**
 * Runs an idempotent call that moves something in parts until all of it is there. Patience starts
 * anew whenever the call says that it got on; what does not pass is thrown at once.
 */
export async function withPatience<T>(
  call: (gotOn: () => void) => Promise<T>,
  options: Patience,
  surroundings: Surroundings = realSurroundings,
): Promise<T> {
  const nowMs = options.nowMs ?? (() => performance.now())
  let lastMs = nowMs()
  let failures = 0
  for (;;) {
    try {
      return await call(() => {
        lastMs = nowMs()
        failures = 0
      })
    } catch (error) {
      if (!isPassing(error) || nowMs() - lastMs > options.patienceMs) throw error
      failures++
      options.onFailure?.(error, failures)
      const waitMs = reconnectDelayMs(failures, surroundings.random())
      await surroundings.wait(waitMs, options.signal)
    }
  }
}

export function abortReason(signal: AbortSignal | undefined): Error {
  const reason: unknown = signal?.reason
  return reason instanceof Error ? reason : new Error('aborted')
}
