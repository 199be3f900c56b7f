import assert from 'node:assert/strict'
import test from 'node:test'
import { threadsEach } from '../../coordinator/local-workers.js'

test('workers without a number of threads divide the processors, and each has one at least', () => {
  assert.deepEqual(
    [1, 2, 3, 8, 20].map((numWorkers) => threadsEach(numWorkers, 8)),
    [8, 4, 2, 1, 1],
  )
  assert.equal(threadsEach(0, 8), 8)
})
