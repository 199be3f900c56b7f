import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { after, before, describe, it } from 'node:test'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { CommitLog } from '../../coordinator/commit-log.js'
import { EventLog, type StoredEvent } from '../../coordinator/event-log.js'
import type { CommitLogRecord } from '../../proto/commit-record.js'
import { type NatsFixture, openNats, pidOf, silentLog } from './open-nats.js'

const epoch = (appendNumber: number): CommitLogRecord => ({
  kind: 'epoch',
  coordinatorId: 'c-1',
  appendNumber,
  fleetEpoch: appendNumber,
  timeMs: 0,
  step: 0,
  reason: 'coordinator',
  workers: [],
  planHash: '',
})

describe('commit log', () => {
  let nats: NatsFixture
  let log: CommitLog
  before(async () => {
    nats = await openNats()
    log = await CommitLog.open(nats.connection)
  })
  after(() => nats.close())

  it('refuses an append behind the last record and leaves the log unchanged', async () => {
    const first = await log.append('a', epoch(1), 0)
    assert.equal(first.outcome, 'ok')
    const sequence = first.outcome === 'ok' ? first.sequence : 0
    assert.deepEqual(await log.append('a', epoch(2), 0), { outcome: 'conflict' })
    assert.deepEqual(await log.readAll('a'), [{ sequence, record: epoch(1) }])
    assert.equal((await log.append('a', epoch(2), sequence)).outcome, 'ok')
  })

  it('counts the sequences of one job apart from those of another', async () => {
    assert.equal((await log.append('b', epoch(1), 0)).outcome, 'ok')
    assert.equal(await log.readLast('c'), null)
    assert.deepEqual(await log.readAll('c'), [])
  })

  it('reads more records than fit into one page, in order', async () => {
    let last = 0
    for (let number = 1; number <= 600; number++) {
      const result = await log.append('long', epoch(number), last)
      assert.ok(result.outcome === 'ok')
      last = result.sequence
    }
    const records = await log.readAll('long')
    assert.deepEqual(
      records.map(({ record }) => record.appendNumber),
      Array.from({ length: 600 }, (_, index) => index + 1),
    )
    assert.equal((await log.readLast('long'))?.sequence, last)
  })

  it('says unknown where nobody answers; a second append is refused, the log tells', async () => {
    await stopWholly(pidOf(nats))
    const result = await log.append('paused', epoch(1), 0)
    process.kill(pidOf(nats), 'SIGCONT')
    assert.equal(result.outcome, 'unknown')
    // A read may overtake the first append inside the server; an append on its subject cannot.
    assert.deepEqual(await log.append('paused', epoch(1), 0), { outcome: 'conflict' })
    assert.deepEqual((await log.readLast('paused'))?.record, epoch(1))
  })

  it('has everything again after the server was started anew', async () => {
    const before = await log.readAll('long')
    await nats.restart()
    log = await CommitLog.open(nats.connection)
    assert.deepEqual(await log.readAll('long'), before)
  })
})

/** SIGSTOP is in force once every thread says so: until then one of them may still answer. */
async function stopWholly(pid: number): Promise<void> {
  process.kill(pid, 'SIGSTOP')
  const isStopped = (task: string) =>
    /\) T /.test(readFileSync(`/proc/${pid}/task/${task}/stat`, 'utf8'))
  const deadlineMs = performance.now() + 10_000
  while (!readdirSync(`/proc/${pid}/task`).every(isStopped)) {
    assert.ok(performance.now() < deadlineMs, `process ${pid} does not stop`)
    await nextTurn()
  }
}

describe('event log', () => {
  let nats: NatsFixture
  const openLog = () =>
    EventLog.open(nats.connection, { log: silentLog, nowMs: () => 7, onFenced: assert.ifError })
  before(async () => {
    nats = await openNats()
  })
  after(() => nats.close())

  const collect = async (log: EventLog, from: number, until: number) => {
    const stop = new AbortController()
    const events: StoredEvent[] = []
    for await (const batch of log.subscribe('j', from, stop.signal)) {
      events.push(...batch)
      if ((events.at(-1)?.sequence ?? 0) >= until) stop.abort()
    }
    return events
  }
  const line = (message: string) => ({ log: { level: 'info', message, workerId: '' } })
  const numbers = (from: number, to: number) =>
    Array.from({ length: to - from + 1 }, (_, index) => from + index)

  it('gives a subscriber what was, then what comes, without gap or duplicate', async () => {
    const log = await openLog()
    for (const number of numbers(1, 1_500)) log.append('j', line(`${number}`))
    await log.flush()
    const collected = collect(log, 3, 3_000)
    for (const number of numbers(1_501, 3_000)) log.append('j', line(`${number}`))
    const events = await collected
    assert.deepEqual(
      events.map((event) => event.sequence),
      numbers(4, 3_000),
    )
    assert.equal(events.at(-1)?.log?.message, '3000')
    await log.close()
  })

  it('goes on with the numbers after a restart, and old ones are still there', async () => {
    await nats.restart()
    const log = await openLog()
    log.append('j', line('after'))
    const events = await collect(log, 0, 3_001)
    assert.deepEqual(
      events.map((event) => event.sequence),
      numbers(1, 3_001),
    )
    assert.equal(events.at(-1)?.log?.message, 'after')
    await log.close()
  })

  it('keeps order and numbers while the server dies under it', async () => {
    const log = await openLog()
    const collected = collect(log, 3_001, 3_601)
    for (const number of numbers(3_002, 3_301)) log.append('j', line(`${number}`))
    process.kill(pidOf(nats), 'SIGKILL')
    for (const number of numbers(3_302, 3_601)) log.append('j', line(`${number}`))
    const events = await collected
    assert.deepEqual(
      events.map((event) => event.log?.message),
      numbers(3_002, 3_601).map(String),
    )
    await log.close()
  })
})
