import assert from 'node:assert/strict'
import { test } from 'node:test'
import type { FeedEvent } from '../../dashboard/feed-messages.js'
import { formatBytes, formatDuration, formatLoss } from '../../dashboard/format.js'
import { freshnessOf, freshnessText, reconnectDelayMs } from '../../dashboard/freshness.js'
import { JobView, timeLeftMs, workersNow } from '../../dashboard/job-view.js'
import { smoothed } from '../../dashboard/smoothing.js'

type Body = Omit<FeedEvent, 'sequence' | 'jobId' | 'timeMs'>

const numbered = (bodies: Body[], first = 1): FeedEvent[] =>
  bodies.map((body, i) => ({
    ...body,
    sequence: first + i,
    jobId: 'j',
    timeMs: 1_000 * (first + i),
  }))

const stepEvent = (step: number, extra: object = {}): Body => ({
  step: {
    step,
    numSteps: 10,
    loss: 5 - step / 4,
    gradNorm: 1,
    etaMs: 9_000,
    numTokens: 100,
    ...extra,
  },
})

const run: FeedEvent[] = numbered([
  { stateChanged: { state: 'VALIDATING' } },
  { preflight: { numUsedRows: 3, numTokens: 90, findings: ['short'] } },
  { plan: { numSteps: 10 } },
  {
    fleet: {
      fleetEpoch: 1,
      workers: [{ workerId: 'w-1', state: 'training' }, { workerId: 'w-2' }],
    },
  },
  { stateChanged: { state: 'RUNNING' } },
  stepEvent(1, {
    shares: [
      { workerId: 'w-1', numMicroBatches: 3 },
      { workerId: 'w-2', numMicroBatches: 1 },
    ],
  }),
  stepEvent(2),
  { checkpoint: { step: 2, sizeBytes: 1024, seconds: 0.1 } },
  stepEvent(3),
])

test('view: any mixture of repeats, reloads and batches ends in the same view', () => {
  const whole = new JobView('j')
  assert.equal(whole.apply(run), true)
  for (let cut = 0; cut <= run.length; cut++) {
    const pieces = new JobView('j')
    pieces.apply(run.slice(0, cut))
    pieces.apply(run.slice(0, Math.max(0, cut - 2)))
    assert.equal(pieces.apply(run), true)
    assert.deepEqual(pieces, whole)
  }
})

test('view: a hole is refused and leaves the view at what came before it', () => {
  const view = new JobView('j')
  assert.equal(view.apply([...run.slice(0, 3), ...run.slice(5)]), false)
  assert.equal(view.lastSequence, 3)
  assert.equal(view.apply(run.slice(3)), true)
  assert.equal(view.step, 3)
})

test('view: a skipped step moves the run on, has no point, is marked and listed', () => {
  const view = new JobView('j')
  view.apply(run)
  const skip = { step: 4, numSteps: 10, microBatch: 2, reason: 'NaN', etaMs: 6_000 }
  view.apply(numbered([{ stepSkipped: skip }], run.length + 1))
  assert.deepEqual([view.step, view.points.length, view.skippedSteps], [4, 3, [4]])
  assert.deepEqual(view.marks.at(-1), { step: 4, kind: 'skip' })
  assert.equal(view.lines.at(-1)?.text, 'Step 4 skipped: micro-batch 2: NaN')
  assert.equal(timeLeftMs(view, 1_000 * (run.length + 1) + 500), 5_500)
  // Rolled back, the step comes again and counts.
  view.apply(numbered([stepEvent(4)], run.length + 2))
  assert.deepEqual([view.step, view.points.length, view.skippedSteps], [4, 4, []])
  assert.ok(view.marks.every((mark) => mark.kind !== 'skip'))
})

test('view: steps that come again after a rollback replace what was ahead of them', () => {
  const view = new JobView('j')
  view.apply(run)
  view.apply(numbered([stepEvent(2, { loss: 9 }), stepEvent(3, { loss: 8 })], run.length + 1))
  assert.deepEqual(
    view.points.map((point) => [point.step, point.loss]),
    [
      [1, 4.75],
      [2, 9],
      [3, 8],
    ],
  )
  assert.equal(view.points.at(-1)?.tokensSoFar, 300)
})

test('view: a loss that is no number is a hole, not a zero', () => {
  const view = new JobView('j')
  view.apply(numbered([stepEvent(1, { loss: null }), stepEvent(2, { loss: 'NaN' })]))
  assert.deepEqual(
    view.points.map((point) => point.loss),
    [null, null],
  )
})

test('view: shares of a step are parts of its micro-batches', () => {
  const view = new JobView('j')
  view.apply(run.slice(0, 6))
  assert.deepEqual(
    view.workers.map((worker) => [worker.workerId, worker.share]),
    [
      ['w-1', 0.75],
      ['w-2', 0.25],
    ],
  )
})

test('view: workers show what they do now, not what they did when the job ended', () => {
  const view = new JobView('j')
  view.apply(run)
  const statesWith = (live: Parameters<typeof workersNow>[1]) =>
    workersNow(view, live).map((worker) => worker.state)
  const first = { workerId: 'w-1', state: 'training' }
  assert.deepEqual(statesWith(null), ['training', ''])
  assert.deepEqual(statesWith([first]), ['training', 'gone'])
  assert.deepEqual(statesWith([{ workerId: 'w-1', state: 'idle', jobId: '' }]), ['idle', 'gone'])
  assert.deepEqual(statesWith([{ ...first, jobId: 'other' }]), ['elsewhere', 'gone'])
})

test('view: a failure keeps its code and words; a resume clears them', () => {
  const view = new JobView('j')
  const error = { code: 'DISK_FULL', message: 'no room' }
  view.apply(numbered([{ stateChanged: { state: 'PAUSED', error } }]))
  assert.deepEqual(view.error, { ...error, details: [] })
  view.apply(numbered([{ stateChanged: { state: 'RUNNING' } }], 2))
  assert.equal(view.error, null)
})

test('view: the list of events is bounded', () => {
  const view = new JobView('j')
  view.apply(
    numbered(Array.from({ length: 1_200 }, () => ({ log: { level: 'info', message: 'x' } }))),
  )
  assert.equal(view.lines.length, 500)
  assert.equal(view.lines.at(-1)?.sequence, 1_200)
})

test('view: control bytes in texts are shown, not sent to the page', () => {
  const view = new JobView('j')
  view.apply(numbered([{ log: { level: 'info', message: 'a\x1b[31mb\nc' } }]))
  assert.equal(view.lines[0]?.text, 'a\\x1b[31mb c')
})

test('time left: counts down between steps, never below zero, and is nothing after the end', () => {
  const view = new JobView('j')
  view.apply(run)
  const last = view.points.at(-1)?.timeMs ?? 0
  assert.equal(timeLeftMs(view, last + 2_000), 7_000)
  assert.equal(timeLeftMs(view, last + 60_000), 0)
  view.apply(numbered([{ stateChanged: { state: 'SUCCEEDED' } }], run.length + 1))
  assert.equal(timeLeftMs(view, last), null)
})

test('smoothing: debiased, so that a constant stays itself from the first point on', () => {
  for (const weight of [0, 0.5, 0.9, 0.99]) {
    for (const value of smoothed([3, 3, 3, 3], weight)) assert.ok(Math.abs((value ?? 0) - 3) < 1e-9)
  }
})

test('smoothing: follows the definition and steps over holes', () => {
  const [first, hole, third] = smoothed([1, null, 4], 0.5)
  assert.equal(first, 1)
  assert.equal(hole, null)
  assert.ok(Math.abs((third ?? 0) - (0.25 * 1 + 0.5 * 4) / 0.75) < 1e-12)
})

test('freshness: live below three seconds, then stale; without a connection disconnected', () => {
  const at = (isOpen: boolean, lastHeardMs: number | null, nowMs: number) =>
    freshnessText(freshnessOf({ isOpen, lastHeardMs }, nowMs))
  assert.equal(at(true, 1_000, 3_999), 'live')
  assert.equal(at(true, 1_000, 4_000), 'stale 3 s')
  assert.equal(at(false, 1_000, 6_500), 'disconnected 5 s')
  assert.equal(at(false, null, 6_500), 'connecting')
})

test('reconnect: the delay grows to five seconds and is never less than half its ceiling', () => {
  assert.equal(reconnectDelayMs(1, 0), 125)
  assert.equal(reconnectDelayMs(1, 1), 250)
  assert.equal(reconnectDelayMs(1_000, 1), 5_000)
})

test('format: nothing known is a dash', () => {
  assert.deepEqual([null, 1.5, 1e-5, Number.POSITIVE_INFINITY].map(formatLoss), [
    '–',
    '1.5000',
    '1.00e-5',
    'Infinity',
  ])
  assert.deepEqual([0, 59_600, 3_599_000, 90_000_000].map(formatDuration), [
    '0 ms',
    '1m 00s',
    '59m 59s',
    '25h 00m',
  ])
  assert.deepEqual([0, 900, 58e6].map(formatBytes), ['–', '900 B', '55.3 MiB'])
})
