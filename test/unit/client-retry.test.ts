import assert from 'node:assert/strict'
import { test } from 'node:test'
import { Metadata, status } from '@grpc/grpc-js'
import { isLoopback } from '../../client/client.js'
import { namedEndpoint, parseEndpoint, stateDirFor } from '../../client/endpoint.js'
import { backoffMs, defaultRetryPolicy, withPatience, withRetries } from '../../client/retry.js'
import { reconnectDelayMs } from '../../proto/backoff.js'
import { TunemeshError } from '../../proto/errors.js'
import { errorOfRpc, rpcStatusOf } from '../../proto/rpc-error.js'

const policy = { maxAttempts: 3, firstDelayMs: 100, maxDelayMs: 250 }

function failing(errors: Error[]) {
  const waits: number[] = []
  let numCalls = 0
  const call = async () => {
    numCalls++
    const error = errors.shift()
    if (error) throw error
    return 'answer'
  }
  const surroundings = {
    wait: async (ms: number) => {
      waits.push(ms)
    },
    random: () => 1,
  }
  return { run: () => withRetries(call, policy, surroundings), waits, count: () => numCalls }
}

const passing = () => new TunemeshError('COORDINATOR_UNREACHABLE', 'gone')

test('retry: passing failures are tried again with a growing, capped delay', async () => {
  const it = failing([passing(), passing()])
  assert.equal(await it.run(), 'answer')
  assert.deepEqual(it.waits, [100, 200])
})

test('retry: the last of the allowed attempts gives its error', async () => {
  const it = failing([passing(), passing(), passing(), passing()])
  await assert.rejects(it.run(), { code: 'COORDINATOR_UNREACHABLE' })
  assert.equal(it.count(), 3)
})

test("retry: a user's mistake is sent once", async () => {
  const it = failing([new TunemeshError('JOB_INVALID', 'no')])
  await assert.rejects(it.run(), { code: 'JOB_INVALID' })
  assert.equal(it.count(), 1)
})

test('patience: counts from the last time that the call got on', async () => {
  let nowMs = 0
  const waits: number[] = []
  const surroundings = {
    wait: async (ms: number) => {
      waits.push(ms)
      nowMs += 40
    },
    random: () => 1,
  }
  const failures: number[] = []
  const options = {
    patienceMs: 100,
    nowMs: () => nowMs,
    onFailure: (_: Error, inARow: number) => failures.push(inARow),
  }
  let numCalls = 0
  const call = async (gotOn: () => void) => {
    if (++numCalls === 3) gotOn()
    throw passing()
  }
  await assert.rejects(withPatience(call, options, surroundings), {
    code: 'COORDINATOR_UNREACHABLE',
  })
  assert.deepEqual(failures, [1, 2, 1, 2, 3])
  assert.deepEqual(waits, [100, 200, 100, 200, 400])
  const wrong = async () => {
    throw new TunemeshError('DIGEST_MISMATCH', 'no')
  }
  await assert.rejects(withPatience(wrong, options, surroundings), { code: 'DIGEST_MISMATCH' })
  assert.equal(waits.length, 5)
})

test('reconnect: any wait from nothing to a ceiling that doubles up to 2 s', () => {
  for (const [failures, ceiling] of [
    [1, 100],
    [2, 200],
    [5, 1_600],
    [6, 2_000],
    [9_000, 2_000],
  ] as const) {
    assert.equal(reconnectDelayMs(failures, 0), 0)
    assert.equal(reconnectDelayMs(failures, 1), ceiling)
  }
})

test('retry: the delay lies between half and the whole of its ceiling, at any attempt', () => {
  for (const attempt of [1, 2, 5, 40, 5_000]) {
    const ceiling = Math.min(2_000, 100 * 2 ** Math.min(attempt - 1, 20))
    assert.equal(backoffMs(defaultRetryPolicy, attempt, 0), ceiling / 2)
    assert.equal(backoffMs(defaultRetryPolicy, attempt, 1), ceiling)
  }
})

test('endpoint: what a dying coordinator left half written is the same as none', () => {
  const old = { grpc: '127.0.0.1:1', token: 't', dashboard: 'http://x/', pid: 7 }
  const whole = { ...old, isHeld: true, numWorkers: 2 }
  assert.deepEqual(parseEndpoint(JSON.stringify({ ...whole, version: '9' })), whole)
  // Of a version that did not say these: it runs jobs, with workers that nobody counted.
  assert.deepEqual(parseEndpoint(JSON.stringify(old)), { ...old, isHeld: false, numWorkers: 0 })
  assert.equal(parseEndpoint(null), null)
  assert.equal(parseEndpoint('{"grpc": "127.0'), null)
  assert.equal(parseEndpoint('{"grpc": "127.0.0.1:1"}'), null)
})

test('endpoint: a named coordinator needs a port and a token', () => {
  assert.throws(() => namedEndpoint('host', 't'), { code: 'COORDINATOR_UNREACHABLE' })
  assert.throws(() => namedEndpoint('host:1', undefined), { code: 'NOT_AUTHENTICATED' })
  assert.equal(namedEndpoint('host:1', 't').grpc, 'host:1')
})

test('endpoint: the folder is the one asked for, TUNEMESH_HOME, then the XDG state folder', () => {
  assert.equal(stateDirFor('/a', { TUNEMESH_HOME: '/b' }), '/a')
  assert.equal(stateDirFor(undefined, { TUNEMESH_HOME: '/b' }), '/b')
  assert.equal(stateDirFor(undefined, { XDG_STATE_HOME: '/c' }), '/c/tunemesh')
})

test('connect: only addresses of this machine count as loopback', () => {
  for (const address of ['127.0.0.1:8471', 'localhost:1', '[::1]:1', '127.8.9.10:2']) {
    assert.equal(isLoopback(address), true, address)
  }
  for (const address of ['127.0.0.1.example.org:1', '10.0.0.1:1', 'localhost.example:1']) {
    assert.equal(isLoopback(address), false, address)
  }
})

test('rpc: a call reset without words lost its connection, which passes; words stay', () => {
  for (const code of [status.CANCELLED, status.INTERNAL, status.UNAVAILABLE]) {
    const bare = Object.assign(new Error('reset'), { code, details: '', metadata: new Metadata() })
    assert.equal(errorOfRpc(bare).code, 'COORDINATOR_UNREACHABLE')
  }
  const late = Object.assign(new Error(''), { code: status.DEADLINE_EXCEEDED, details: 'late' })
  assert.equal(errorOfRpc(late).code, 'DEADLINE_EXCEEDED')
  const told = [new TunemeshError('JOB_STOPPED', 'halted'), new Error('a bug')].map(
    (error) => errorOfRpc(Object.assign(new Error(''), rpcStatusOf(error))).code,
  )
  assert.deepEqual(told, ['JOB_STOPPED', 'INTERNAL'])
})
