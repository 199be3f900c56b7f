/**
 * A failure as its reader needs it: code, what happened, every further problem, what to do next.
 */
import { type ErrorCode, TunemeshError } from '../proto/errors.js'
import { escapeLine, escapeText } from './escape.js'
import type { Style } from './style.js'

const hints: Partial<Record<ErrorCode, string>> = {
  COORDINATOR_UNREACHABLE: 'Is the coordinator running, and is the address right?',
  DEADLINE_EXCEEDED: 'The outcome is unknown. `tunemesh jobs` shows what the coordinator has.',
  NOT_AUTHENTICATED: "The token is in endpoint.json of the coordinator's state folder.",
  NATS_SERVER_MISSING: '`tunemesh doctor` lists where it was looked for.',
  ENGINE_MISSING: '`tunemesh doctor` says what is missing; `npm run build` builds the engine.',
  INTERNAL: 'This is our fault, not yours. Run again with --verbose and report what it prints.',
}

export function renderError(error: TunemeshError, style: Style): string {
  const lines = [`${style.bad(error.code)} ${escapeText(error.message)}`]
  for (const detail of error.details) lines.push(`  ${escapeLine(detail)}`)
  // Our own words for a coordinator that is not there say what to do; a call that failed does not.
  const isOwnWord = error.code === 'COORDINATOR_UNREACHABLE' && error.cause === undefined
  const hint = isOwnWord ? undefined : hints[error.code]
  if (hint !== undefined) lines.push(style.dim(hint))
  return lines.join('\n')
}

/**
 * What is not a TunemeshError is a bug of ours: one line, the stack only where it was asked for.
 */
export function asTunemeshError(error: unknown): TunemeshError {
  if (error instanceof TunemeshError) return error
  const system = error as NodeJS.ErrnoException
  if (system.code === 'ENOSPC') {
    return new TunemeshError('DISK_FULL', `${system.message}. Free some space and try again.`)
  }
  const text = error instanceof Error ? error.message : String(error)
  return new TunemeshError('INTERNAL', text, { cause: error })
}
