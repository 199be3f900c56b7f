/** Processes of a session, to prove that a mesh leaves none behind. */
import { readdirSync, readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'

/** Ids of live processes in the session of an embedded coordinator, zombies not counted. */
export function processesOf(sessionId: number): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => isInSession(pid, sessionId))
}

function isInSession(pid: number, sessionId: number): boolean {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'utf8')
    // Behind the program's name in parentheses: state, parent, group, session.
    const [state, , , session] = text.slice(text.lastIndexOf(')') + 2).split(' ')
    return state !== 'Z' && Number(session) === sessionId
  } catch {
    return false // it ended while we looked
  }
}

export const untilGone = (sessionId: number) => untilNone(() => processesOf(sessionId))

/** Live processes whose command line names `path`: a zombie has none. */
export const processesNaming = (path: string): number[] =>
  readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name) && commandOf(name).includes(path))
    .map(Number)

function commandOf(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8')
  } catch {
    return '' // it ended while we looked
  }
}

/**
 * The kernel tells nobody that a stranger's process has ended, so this one looks again and again.
 */
export async function untilNone(alive: () => number[], withinMs = 20_000): Promise<void> {
  const deadline = performance.now() + withinMs
  for (;;) {
    const left = alive()
    if (left.length === 0) return
    if (performance.now() > deadline) throw new Error(`still alive: ${left.join(', ')}`)
    await delay(25)
  }
}
