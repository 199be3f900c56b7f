import assert from 'node:assert/strict'
import { test } from 'node:test'
import {
  compare,
  isWithin,
  keyOf,
  type Precision,
  type QualityRow,
} from '../../bench/quality/comparison.js'

function row(precision: Precision, seed: number, loss: number): QualityRow {
  return {
    ...{ data: 'gsm8k', precision, seed, model: 'm.gguf', steps: 300, batch: 8, max_length: 512 },
    ...{ learning_rate: 2e-4, held_out_rows: 128, last_steps: 50, last_loss: loss },
    ...{ held_out_before: 2, held_out_loss: loss + 1, seconds: 9, device: 'd', date: '' },
    commit: null,
  }
}

const find = (rows: QualityRow[], precision: Precision) =>
  compare(rows).find((it) => it.precision === precision && it.loss === 'last_loss')

test('precisions are compared over the seeds that both have, each seed with its own pair', () => {
  const rows = [row('fp32', 1, 1), row('fp32', 2, 2), row('bf16', 1, 1.01), row('bf16', 3, 9)]
  const bf16 = find(rows, 'bf16')
  assert.equal(bf16?.seeds, 2)
  assert.equal(bf16?.against, 'fp32')
  assert.ok(Math.abs((bf16?.differencePercent ?? 0) - 1) < 1e-9)
  assert.equal(bf16 && isWithin(bf16), false)
  const fp32 = find(rows, 'fp32')
  assert.deepEqual([fp32?.mean, fp32?.spread, fp32?.against], [1.5, 1, null])
  assert.equal(fp32 && isWithin(fp32), null)
})

test('fp8 stands beside bf16; opposite differences cancel in the mean and stay as the most', () => {
  const rows = [row('bf16', 1, 1), row('bf16', 2, 1), row('fp8', 1, 1.02), row('fp8', 2, 0.98)]
  const fp8 = find(rows, 'fp8')
  assert.equal(fp8?.against, 'bf16')
  assert.ok(Math.abs(fp8?.differencePercent ?? 1) < 1e-9)
  assert.ok(Math.abs(Math.abs(fp8?.mostPercent ?? 0) - 2) < 1e-9)
  assert.equal(fp8 && isWithin(fp8), true)
})

test('a run is known again by all that its losses depend on', () => {
  const one = row('bf16', 1, 1)
  const again: QualityRow = { ...one, last_loss: 7, seconds: 1 }
  assert.equal(keyOf(one), keyOf(again))
  for (const change of [{ seed: 2 }, { steps: 20 }, { learning_rate: 1e-3 }, { model: 'n' }])
    assert.notEqual(keyOf(one), keyOf({ ...one, ...change }))
})
