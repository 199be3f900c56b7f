/** Processes below one of ours, by name: what a test kills without being told its id. */
import { readFileSync } from 'node:fs'

export function childrenNamed(name: string, root: number): number[] {
  const found: number[] = []
  const visit = (pid: number) => {
    for (const child of childrenOf(pid)) {
      if (readOr(`/proc/${child}/comm`).startsWith(name)) found.push(child)
      visit(child)
    }
  }
  visit(root)
  return found
}

function childrenOf(pid: number): number[] {
  const text = readOr(`/proc/${pid}/task/${pid}/children`).trim()
  return text === '' ? [] : text.split(' ').map(Number)
}

/** Empty where the process ended while we looked. */
function readOr(path: string): string {
  try {
    return readFileSync(path, 'utf8')
  } catch {
    return ''
  }
}
