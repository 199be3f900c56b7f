import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { estimateTime, flopsPerToken } from '../../coordinator/job-estimate.js'
import type { PreparedJob } from '../../coordinator/prepared-job.js'
import type { PlanResult__Output } from '../../proto/gen/tunemesh/v1/PlanResult.js'

const numTrained = 1_000

/** Two layers of 8 channels, a vocabulary of 10; 5 packs of 32 tokens with two rows each. */
function jobOf(finetuning: 'full' | 'lora', numTargetTokens: number): PreparedJob {
  const modelConfig = {
    vocabSize: 10,
    hiddenSize: 8,
    intermediateSize: 20,
    numLayers: 2,
    numHeads: 4,
    numKvHeads: 2,
    headSize: 3,
  }
  return {
    spec: { finetuning, num_train_epochs: 2 },
    modelConfig,
    train: { numPacks: 5, tokensPerPack: new Int32Array(5).fill(32), longestDocument: 32 },
    schedule: { numSteps: 3, microBatchesPerStep: 2, packsPerMicroBatch: 1 },
    report: { numTokens: 160, numTargetTokens, numUsedRows: 10 },
  } as unknown as PreparedJob
}

const answer = {
  numTrainedParameters: numTrained,
  productFlopsPerSecond: 1e9,
  measuredSeconds: 0.34,
} as PlanResult__Output

// By hand: a layer has 8*12 + 2 * 8*6 + 12*8 = 288 elements of attention and 3 * 8*20 = 480 of
// its feed-forward.
const layers = 2 * (288 + 480)
const head = 80
const attention = 6 * 16 * 12 * 2

describe('time estimate', () => {
  it('counts 6 P and attention for full, 4 P_frozen + 6 P_adapter and attention for LoRA', () => {
    assert.equal(flopsPerToken(jobOf('full', 160), numTrained), 6 * (layers + head) + attention)
    assert.equal(
      flopsPerToken(jobOf('lora', 160), numTrained),
      4 * (layers + head) + 6 * numTrained + attention,
    )
  })

  it('counts the head for trained tokens only', () => {
    assert.equal(flopsPerToken(jobOf('full', 40), 0), 6 * (layers + head / 4) + attention)
  })

  it('divides the work of all steps by speed and workers, and says what it rests on', () => {
    const { seconds, basis } = estimateTime(jobOf('full', 160), answer, 2)
    const flops = 6 * 32 * (6 * (layers + head) + attention)
    const expected = flops / 0.7e9 / 2 + 3 * 0.03
    assert.ok(Math.abs((seconds ?? 0) / expected - 1) < 1e-12)
    assert.match(basis, /^2 workers; from a 0\.3 s measurement on this machine: .* 1 GFLOP\/s/)
  })

  it('is unknown, not zero, where nobody has measured', () => {
    const job = jobOf('full', 160)
    assert.deepEqual(estimateTime(job, null, 0), { seconds: null, basis: 'no worker is attached' })
    const unmeasured = { ...answer, productFlopsPerSecond: 0 }
    assert.equal(estimateTime(job, unmeasured, 1).seconds, null)
  })
})
