import { writeSync } from 'node:fs'

/**
 * Named places where a test kills its own process: before and after each durable act, and in the
 * middle of an owner's publishing (proto/PROTOCOL.md lists them). Nothing is armed unless a main.ts
 * was started with --testing.
 */
const armed = new Map<string, number>()

/** `spec`: "name" or "name:3" (at the third passing), several with commas. */
export function armFailpoints(spec: string): void {
  for (const part of spec.split(',').filter((text) => text !== '')) {
    const [name = '', count = '1'] = part.split(':')
    armed.set(name, Number(count))
  }
}

/** Ends this process as kill -9 would, if a test armed this name and its count is reached. */
export function failpoint(name: string): void {
  const left = armed.get(name)
  if (left === undefined) return
  armed.set(name, left - 1)
  if (left > 1) return
  // Written at once: the test must know which of its failpoints was reached.
  writeSync(2, `${failpointLine(name)}\n`)
  process.kill(process.pid, 'SIGKILL')
}

/**
 * True where a test armed this name and its count is reached: the caller then fails as its device
 * might.
 */
export function faultpoint(name: string): boolean {
  const left = armed.get(name)
  if (left === undefined) return false
  armed.set(name, left - 1)
  if (left !== 1) return false
  writeSync(2, `failed at faultpoint ${name}\n`)
  return true
}

/** What a process says on stderr with its last breath. */
const failpointLine = (name: string): string => `killed at failpoint ${name}`
