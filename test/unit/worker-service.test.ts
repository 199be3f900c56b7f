import assert from 'node:assert/strict'
import { EventEmitter } from 'node:events'
import { test } from 'node:test'
import pino from 'pino'
import { WorkerProofs } from '../../coordinator/access.js'
import { Fleet } from '../../coordinator/fleet.js'
import { workerHandlers } from '../../coordinator/worker-service.js'
import type { ToWorker } from '../../proto/gen/tunemesh/v1/ToWorker.js'
import { version } from '../../proto/version.js'

const hourMs = 3_600_000

/** The coordinator's end of one worker's stream. */
class Call extends EventEmitter {
  readonly written: ToWorker[] = []
  write(message: ToWorker): void {
    this.written.push(message)
  }
  end(): void {}
  getAuthContext = () => ({})
}

const addressUntil = (expiresMs: number) => ({
  url: 'nats://here',
  user: 'w-a',
  credentials: { jwt: `until ${expiresMs / hourMs} h`, seed: 'seed' },
})
type Sign = (workerId: string, expiresMs: number) => Promise<ReturnType<typeof addressUntil>>

/** A worker that has said Hello. */
async function attached(workerAddress: Sign = async (_, expiresMs) => addressUntil(expiresMs)) {
  const fleet = new Fleet({ deadAfterMs: 1e9, nowMs: () => 0, maxWorkers: 1 })
  const log = pino({ level: 'silent' })
  const nats = { workerAddress }
  const proofs = new WorkerProofs('secret')
  const limits = { heartbeatMs: 1, helloTimeoutMs: 1_000, userSeedOf: () => '' }
  const handlers = workerHandlers({ fleet, proofs, nats, ...limits, log })
  const call = new Call()
  handlers.Attach(call as never)
  call.emit('data', { hello: { version, previousWorkerId: '', host: 'here' } })
  await settled()
  return call
}

const renewals = ({ written }: Call) =>
  written.flatMap(({ renewedNats }) => (renewedNats ? [renewedNats.jwt] : []))
/** What a timer began has been carried out. */
async function settled(): Promise<void> {
  for (let turn = 0; turn < 10; turn++) await Promise.resolve()
}

test('a worker gets its next NATS credentials after 12 of 24 hours, until it leaves', async (t) => {
  t.mock.timers.enable({ apis: ['setInterval', 'setTimeout', 'Date'], now: 0 })
  const call = await attached()
  assert.equal(call.written[0]?.welcome?.nats?.jwt, 'until 24 h')
  t.mock.timers.tick(12 * hourMs - 1)
  await settled()
  assert.deepEqual(renewals(call), [])
  t.mock.timers.tick(1)
  await settled()
  assert.deepEqual(renewals(call), ['until 36 h'])
  t.mock.timers.tick(12 * hourMs)
  await settled()
  assert.deepEqual(renewals(call), ['until 36 h', 'until 48 h'])
  call.emit('end')
  t.mock.timers.tick(48 * hourMs)
  await settled()
  assert.equal(renewals(call).length, 2)
})

test('a renewal that fails leaves the worker attached, and the next one is tried', async (t) => {
  t.mock.timers.enable({ apis: ['setInterval', 'setTimeout', 'Date'], now: 0 })
  let numSigned = 0
  const call = await attached(async (_, expiresMs) => {
    if (++numSigned === 2) throw new Error('the keys cannot be read')
    return addressUntil(expiresMs)
  })
  for (let renewal = 1; renewal <= 2; renewal++) {
    t.mock.timers.tick(12 * hourMs)
    await settled()
  }
  assert.equal(numSigned, 3)
  assert.deepEqual(renewals(call), ['until 48 h'])
})
