/** How long a broken link waits before it is tried again: the same for streams, files and NATS. */
const firstDelayMs = 100
const maxDelayMs = 2_000

/**
 * Full jitter: anything from nothing to a ceiling that doubles with each failure, up to 2 s, so
 * that a hundred workers whose coordinator was away do not come back at the same moment.
 *
 * @param failures in a row, from 1
 * @param random from 0 to 1
 */
export function reconnectDelayMs(failures: number, random: number): number {
  const doublings = Math.min(Math.max(0, failures - 1), 20)
  return Math.min(maxDelayMs, firstDelayMs * 2 ** doublings) * random
}
