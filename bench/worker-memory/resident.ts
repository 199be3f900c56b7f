/** What a process holds in memory, by what its pages belong to: /proc/PID/smaps of Linux. */
import { readFileSync } from 'node:fs'

export interface Resident {
  /** All resident pages but those of the shared packed model. */
  ownBytes: number
  /** The packed base model that a machine's workers map. */
  sharedModelBytes: number
  /** Pages of the model's own files, read on the way. */
  modelFileBytes: number
  /** Programs and libraries. */
  programBytes: number
  /** Heaps, stacks and the arena. */
  anonymousBytes: number
}

const none: Resident = {
  ownBytes: 0,
  sharedModelBytes: 0,
  modelFileBytes: 0,
  programBytes: 0,
  anonymousBytes: 0,
}

/** null: the process is gone. */
export function residentOf(processId: number): Resident | null {
  let text: string
  try {
    text = readFileSync(`/proc/${processId}/smaps`, 'utf8')
  } catch {
    return null
  }
  const resident = { ...none }
  let path = ''
  for (const line of text.split('\n')) {
    const mapping = /^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)$/.exec(line)
    if (mapping) path = mapping[1] ?? ''
    const rss = /^Rss: +(\d+) kB/.exec(line)
    if (!rss) continue
    const bytes = Number(rss[1]) * 1024
    if (path.endsWith('.weights')) {
      resident.sharedModelBytes += bytes
      continue
    }
    resident.ownBytes += bytes
    if (path.endsWith('.gguf') || path.endsWith('.safetensors')) resident.modelFileBytes += bytes
    else if (path.startsWith('/')) resident.programBytes += bytes
    else resident.anonymousBytes += bytes
  }
  return resident
}
