/** How much the page's data can be trusted right now. Pure. */

export type Freshness =
  | { kind: 'live' }
  | { kind: 'stale'; seconds: number }
  | { kind: 'disconnected'; seconds: number | null }

/** The server speaks at least once a second; three missed beats are not chance any more. */
export const staleAfterMs = 3_000

export function freshnessOf(
  connection: { isOpen: boolean; lastHeardMs: number | null },
  nowMs: number,
): Freshness {
  const { isOpen, lastHeardMs } = connection
  const silentMs = lastHeardMs === null ? null : Math.max(0, nowMs - lastHeardMs)
  const seconds = silentMs === null ? null : Math.floor(silentMs / 1_000)
  if (!isOpen || silentMs === null) return { kind: 'disconnected', seconds }
  return silentMs < staleAfterMs ? { kind: 'live' } : { kind: 'stale', seconds: seconds ?? 0 }
}

export function freshnessText(freshness: Freshness): string {
  if (freshness.kind === 'live') return 'live'
  if (freshness.kind === 'stale') return `stale ${freshness.seconds} s`
  return freshness.seconds === null ? 'connecting' : `disconnected ${freshness.seconds} s`
}

/**
 * Delay before attempt n (from 1) to connect again: 250 ms doubling to 5 s, half of it by chance.
 */
export function reconnectDelayMs(attempt: number, random: number): number {
  const ceiling = Math.min(5_000, 250 * 2 ** Math.min(attempt - 1, 10))
  return ceiling * (0.5 + random / 2)
}
