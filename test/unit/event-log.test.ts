import assert from 'node:assert/strict'
import test from 'node:test'
import pino from 'pino'
import { EventLog } from '../../coordinator/event-log.js'
import type { AppendResult, NatsConnection } from '../../coordinator/nats-connection.js'

/** A log whose store answers every append alike. */
function openLog(append: () => Promise<AppendResult>) {
  const connection = { ensureStream: async () => {}, readLast: async () => null, append }
  const options = { log: pino({ level: 'silent' }), nowMs: () => 0, onFenced: () => {} }
  return EventLog.open(connection as unknown as NatsConnection, options)
}

const event = { log: { level: 'info', message: 'the last words' } }

test('a store that is gone does not hold up the end, nor a reader', {
  timeout: 10_000,
}, async () => {
  const log = await openLog(async () => ({ outcome: 'unknown', reason: 'no responders' }))
  log.append('job-a', event)
  const reader = log.waitFor('job-a', 0, new AbortController().signal)
  await log.close(20)
  await reader
})

test('what was appended before the end is stored, without waiting out the grace', async () => {
  let numStored = 0
  const log = await openLog(async () => ({ outcome: 'ok', sequence: ++numStored }))
  log.append('job-a', event)
  await log.close(60_000)
  assert.equal(numStored, 1)
})
