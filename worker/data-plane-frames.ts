/**
 * The first look at a frame: whole, undamaged, of this job and epoch, or refused before anything
 * believes it.
 */
import { type FrameHeader, type FrameKind, readFrameHeader } from '../proto/frame.js'
import type { EpochScope } from './data-plane-link.js'

/** null: refused or outdated, and counted as such. */
export function checkedHeader(
  scope: Pick<EpochScope, 'exchange' | 'jobHash' | 'fleetEpoch' | 'counts'>,
  frame: Uint8Array,
  kind: FrameKind,
): FrameHeader | null {
  if (scope.exchange.frameFault(frame) !== null) {
    scope.counts.framesRefused++
    return null
  }
  const header = readFrameHeader(frame)
  const { jobHash, fleetEpoch } = scope
  if (header.kind === kind && header.jobHash === jobHash && header.fleetEpoch === fleetEpoch) {
    return header
  }
  scope.counts.framesIgnored++
  return null
}

/** What a damaged frame says it is: good enough to ask for it again, not to believe it. */
export function plausibleHeader(frame: Uint8Array): FrameHeader | null {
  try {
    return readFrameHeader(frame)
  } catch {
    return null
  }
}
