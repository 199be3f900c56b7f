import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { Surroundings } from '../../client/retry.js'
import { type WatchSource, watchEvents } from '../../client/watch.js'
import { TunemeshError } from '../../proto/errors.js'
import type { JobEvent__Output as JobEvent } from '../../proto/gen/tunemesh/v1/JobEvent.js'
import type { JobState__Output as JobState } from '../../proto/gen/tunemesh/v1/JobState.js'

const still: Surroundings = { wait: async () => {}, random: () => 0.5 }
const policy = { maxAttempts: 4, firstDelayMs: 1, maxDelayMs: 8 }

const log = (sequence: number): JobEvent => ({
  sequence,
  jobId: 'j',
  timeMs: sequence,
  event: 'log',
  log: { level: 'info', message: `line ${sequence}`, workerId: '' },
})
const state = (sequence: number, to: JobState): JobEvent => ({
  sequence,
  jobId: 'j',
  timeMs: sequence,
  event: 'stateChanged',
  stateChanged: { state: to, error: null },
})

/** Each connection plays one script: its events, then an error or a polite end. */
function scripted(scripts: { events: JobEvent[]; error?: Error }[], now: JobState = 'RUNNING') {
  const opened: number[] = []
  const source: WatchSource = {
    async *open(afterSequence) {
      opened.push(afterSequence)
      const script = scripts.shift() ?? { events: [], error: unreachable() }
      yield* script.events
      if (script.error) throw script.error
    },
    stateNow: async () => now,
  }
  return { source, opened }
}

const unreachable = () => new TunemeshError('COORDINATOR_UNREACHABLE', 'gone')

async function sequences(events: AsyncIterable<JobEvent>): Promise<number[]> {
  const seen: number[] = []
  for await (const event of events) seen.push(event.sequence)
  return seen
}

test('watch: a broken connection goes on after the last sequence: no gap, no double', async () => {
  const { source, opened } = scripted([
    { events: [log(1), log(2)], error: unreachable() },
    { events: [], error: unreachable() },
    { events: [log(2), log(3), state(4, 'SUCCEEDED')] },
  ])
  const told: string[] = []
  const onReconnect = (error: TunemeshError) => told.push(error.code)
  const seen = await sequences(watchEvents(source, { surroundings: still, policy, onReconnect }))
  assert.deepEqual(seen, [1, 2, 3, 4])
  assert.deepEqual(opened, [0, 2, 2])
  assert.deepEqual(told, ['COORDINATOR_UNREACHABLE', 'COORDINATOR_UNREACHABLE'])
})

test('watch: a hole in the numbers is never skipped; the stream is read again', async () => {
  const { source, opened } = scripted([
    { events: [log(1), log(3)] },
    { events: [log(2), log(3), state(4, 'STOPPED')] },
  ])
  assert.deepEqual(
    await sequences(watchEvents(source, { surroundings: still, policy })),
    [1, 2, 3, 4],
  )
  assert.deepEqual(opened, [0, 1])
})

test('watch: a server that ends politely while the job runs is connected to again', async () => {
  const { source } = scripted([{ events: [log(1)] }, { events: [log(2), state(3, 'FAILED')] }])
  assert.deepEqual(await sequences(watchEvents(source, { surroundings: still, policy })), [1, 2, 3])
})

test('watch: a job that had ended before the first event wanted ends the watch', async () => {
  const { source, opened } = scripted([{ events: [] }], 'SUCCEEDED')
  const events = watchEvents(source, { surroundings: still, policy, afterSequence: 9 })
  assert.deepEqual(await sequences(events), [])
  assert.deepEqual(opened, [9])
})

test('watch: a resumed job is followed past its earlier end', async () => {
  const { source } = scripted([
    { events: [state(1, 'STOPPED'), state(2, 'QUEUED')], error: unreachable() },
    { events: [state(3, 'RUNNING'), state(4, 'SUCCEEDED')] },
  ])
  assert.deepEqual(
    await sequences(watchEvents(source, { surroundings: still, policy })),
    [1, 2, 3, 4],
  )
})

test('watch: attempts without a new event are bounded; an event resets the count', async () => {
  const broken = { events: [], error: unreachable() }
  const { source, opened } = scripted([
    broken,
    broken,
    broken,
    { events: [log(1)], error: unreachable() },
  ])
  const events = watchEvents(source, { surroundings: still, policy })
  await assert.rejects(sequences(events), { code: 'COORDINATOR_UNREACHABLE' })
  assert.equal(opened.length, 3 + 1 + 3)
})

test('watch: a failure that does not pass ends it at once', async () => {
  const { source, opened } = scripted([
    { events: [], error: new TunemeshError('JOB_NOT_FOUND', 'no job j') },
  ])
  const events = watchEvents(source, { surroundings: still, policy })
  await assert.rejects(sequences(events), { code: 'JOB_NOT_FOUND' })
  assert.equal(opened.length, 1)
})
