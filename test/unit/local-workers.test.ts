import assert from 'node:assert/strict'
import test from 'node:test'
import { CrashLoop, threadsEach } from '../../coordinator/local-workers.js'

test('workers without a number of threads divide the processors, and each has one at least', () => {
  assert.deepEqual(
    [1, 2, 3, 8, 20].map((numWorkers) => threadsEach(numWorkers, 8)),
    [8, 4, 2, 1, 1],
  )
  assert.equal(threadsEach(0, 8), 8)
})

test('a worker that crashes over and over waits twice as long each time and is given up', () => {
  const loop = new CrashLoop(200)
  const waits = Array.from({ length: 8 }, () => loop.crashed(1_000))
  assert.deepEqual(waits, [200, 400, 800, 1_600, 3_200, 6_400, 12_800, null])
})

test('a worker whose work a step has counted is not given up', () => {
  const loop = new CrashLoop(200)
  for (let crash = 0; crash < 50; crash++) {
    assert.ok((loop.crashed(1_000) ?? Infinity) <= 30_000)
    loop.progressed()
  }
  assert.equal(loop.crashed(61_000), 200)
})
