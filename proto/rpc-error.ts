/**
 * One mapper between TunemeshError and what gRPC carries: a status, and the whole error in trailing
 * metadata.
 */
import { Metadata, type ServiceError, status } from '@grpc/grpc-js'
import { type ErrorCode, errorKinds, isErrorCode, TunemeshError } from './errors.js'

const errorMetadataKey = 'tunemesh-error'

/**
 * Trailers are limited (8 KiB by default in most stacks), so long lists of details are cut and
 * counted.
 */
const maxTrailerBytes = 6_000
const maxMessageChars = 2_000

export interface RpcStatus {
  code: status
  details: string
  metadata: Metadata
}

/**
 * The status under which an error travels. What is not a TunemeshError is ours, never the caller's:
 * it leaves as INTERNAL without its text, which may hold paths; the caller of this logs it.
 */
export function rpcStatusOf(error: unknown): RpcStatus {
  const known =
    error instanceof TunemeshError
      ? error
      : new TunemeshError('INTERNAL', 'The coordinator failed unexpectedly; its log has the cause.')
  const message = known.message.slice(0, maxMessageChars)
  const metadata = new Metadata()
  metadata.set(errorMetadataKey, trailerOf(known.code, message, known.details))
  return { code: errorKinds[known.code].grpc, details: `${known.code} ${message}`, metadata }
}

/**
 * The error that the other side threw; a broken connection and a passed deadline get codes of their
 * own.
 */
export function errorOfRpc(failure: unknown): TunemeshError {
  if (failure instanceof TunemeshError) return failure
  const { code, details, metadata } = failure as Partial<ServiceError>
  const carried = metadata?.get(errorMetadataKey)[0]
  const parsed = typeof carried === 'string' ? parseTrailer(carried) : null
  if (parsed !== null) return new TunemeshError(parsed.code, parsed.message, parsed)
  const text = details || (failure instanceof Error ? failure.message : String(failure))
  const bareCode = codeOfBareStatus(code)
  const message = isReset(code) ? `The connection to the coordinator broke: ${text}` : text
  return new TunemeshError(bareCode, message, { cause: failure })
}

function trailerOf(code: ErrorCode, message: string, details: string[]): string {
  let kept = details
  for (;;) {
    const left = details.length - kept.length
    const shown = left === 0 ? kept : [...kept, `… and ${left} more`]
    const text = asciiJson({ code, message, details: shown })
    if (text.length <= maxTrailerBytes || kept.length === 0) return text
    kept = kept.slice(0, Math.floor(kept.length * 0.75))
  }
}

/** gRPC metadata values are ASCII; JSON can say everything in it. */
const asciiJson = (value: unknown) =>
  JSON.stringify(value).replace(
    /[^\x20-\x7e]/g,
    (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, '0')}`,
  )

function parseTrailer(text: string) {
  try {
    const { code, message, details } = JSON.parse(text) as Record<string, unknown>
    if (!isErrorCode(code) || typeof message !== 'string') return null
    return { code, message, details: Array.isArray(details) ? details.map(String) : [] }
  } catch {
    return null // a trailer of another program: fall back to the bare status
  }
}

function codeOfBareStatus(code: status | undefined): ErrorCode {
  if (code === status.DEADLINE_EXCEEDED) return 'DEADLINE_EXCEEDED'
  if (code === status.UNAVAILABLE || isReset(code)) return 'COORDINATOR_UNREACHABLE'
  if (code === status.UNAUTHENTICATED) return 'NOT_AUTHENTICATED'
  return 'INTERNAL'
}

/**
 * What the other side means to say carries its words in the trailer. A call that was reset without
 * them lost its connection: that passes, and idempotent calls are sent again. Whoever cancels a
 * call itself knows why and does not ask here.
 */
const isReset = (code: status | undefined) => code === status.CANCELLED || code === status.INTERNAL
