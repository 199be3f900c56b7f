import assert from 'node:assert/strict'
import { type ChildProcess, spawn } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { keepRunning, newPlace } from '../../cli/worker.js'
import { errorLine } from '../../proto/error-line.js'
import { TunemeshError } from '../../proto/errors.js'

/** `tunemesh worker` around processes that end in turn as told; null: asked to, and well. */
async function runWorkers(endings: (TunemeshError | null)[]) {
  const notes: string[] = []
  const context = {
    output: { note: (line: string) => notes.push(line) },
    interrupts: { handle: () => () => {} },
  } as unknown as Parameters<typeof keepRunning>[0]
  let numStarted = 0
  const start = (): ChildProcess => {
    const error = endings[numStarted++] ?? null
    const script = error
      ? `process.stdout.write(${JSON.stringify(errorLine(error))}); process.exitCode = 1`
      : ''
    return spawn(process.execPath, ['-e', script], { stdio: ['pipe', 'pipe', 'ignore'] })
  }
  const failure = await keepRunning(context, start).then(
    () => null,
    (error) => error as TunemeshError,
  )
  return { notes, numStarted, failure }
}

const broken = () => new TunemeshError('DEVICE_FAILED', 'cuda copy_out failed: Xid 79.')

test('worker: after a device failure another process takes its place, and says why', async () => {
  const { notes, numStarted, failure } = await runWorkers([broken(), broken(), null])
  assert.deepEqual([numStarted, failure], [3, null])
  assert.match(notes[0] ?? '', /^cuda copy_out failed: Xid 79\. A new worker process/)
})

test('worker: any other failure ends it, and so do eight of the device in a row', async () => {
  const other = await runWorkers([new TunemeshError('NOT_AUTHENTICATED', 'wrong token')])
  assert.deepEqual([other.numStarted, other.failure?.code], [1, 'NOT_AUTHENTICATED'])
  const dead = await runWorkers(Array.from({ length: 20 }, broken))
  assert.deepEqual([dead.numStarted, dead.failure?.code], [8, 'DEVICE_FAILED'])
})

test('worker: a place is the first that no live worker of the same device has', (t) => {
  const stateDir = mkdtempSync(join(tmpdir(), 'tunemesh-places-'))
  t.after(() => rmSync(stateDir, { recursive: true }))
  // No process has this number.
  const dead = join(stateDir, 'workers', '999999999.cuda0.1')
  mkdirSync(dead, { recursive: true })
  const first = newPlace(stateDir, 'cuda:0')
  assert.deepEqual(
    [first.place, newPlace(stateDir, 'cuda:0').place, newPlace(stateDir, 'cpu').place],
    ['joined-1', 'joined-2', 'joined-1'],
  )
  assert.equal(existsSync(dead), false)
  rmSync(first.workDir, { recursive: true })
  assert.equal(newPlace(stateDir, 'cuda:0').place, 'joined-1')
})
