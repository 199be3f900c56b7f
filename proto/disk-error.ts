/** A full disk told apart from other failures of a write. */
import { TunemeshError } from './errors.js'

/** ENOSPC and EDQUOT become DISK_FULL, which pauses a job instead of failing it. */
export function diskError(error: unknown, what: string): unknown {
  const code = (error as NodeJS.ErrnoException).code
  if (code !== 'ENOSPC' && code !== 'EDQUOT') return error
  return new TunemeshError('DISK_FULL', `${what} does not fit on the disk. Free some space.`, {
    cause: error,
  })
}
