/** The engine against values of transformers and peft (test/golden/README.md), without a mesh. */
import assert from 'node:assert/strict'
import { join } from 'node:path'
import { test } from 'node:test'
import type { Engine } from '../../worker/engine.js'
import { floats, readTensors } from '../golden-run/safetensors.js'
import {
  type Expected,
  expectedOf,
  families,
  goldenBatch,
  goldenEngine,
  goldenFolder,
  goldenLora,
  goldenSpec,
  isPresent,
  localStep,
  numTargets,
  relativeError,
  type TrainingReference,
} from './engine-fixture.js'

const maxLogitError = 1e-4
const maxGradientError = 2e-5
const maxLossError = 1e-5
/** Over all trained parameters after 20 steps, of the change from the start. */
const maxDriftError = 3e-4

for (const family of families) {
  const options = { skip: isPresent(family) ? false : `test/golden/${family} is absent` }

  test(
    `golden ${family}: logits, loss and greedy continuation equal the reference`,
    options,
    async () => {
      const engine = await goldenEngine(family)
      const folder = goldenFolder(family)
      const expected = expectedOf(family)
      const batch = goldenBatch(family, 0)
      const wanted = floats(readTensors(join(folder, 'full.expected.safetensors')), 'logits')
      const logits = await engine.logits(batch)
      assert.equal(logits.length, wanted.length)
      const worst = wanted.reduce(
        (most, value, i) => Math.max(most, Math.abs(value - (logits[i] ?? NaN))),
        0,
      )
      assert.ok(worst <= maxLogitError, `logits differ by ${worst}`)

      const { lossSum, numTargetTokens } = await engine.evaluate(batch)
      assert.equal(numTargetTokens, numTargets(batch))
      assertClose(lossSum / numTargetTokens, expected.loss, 'loss')

      const told: number[] = []
      const answer = await engine.generate(
        {
          promptIds: Int32Array.from(expected.greedy.prompt),
          maxNewTokens: expected.greedy.continuation.length,
          temperature: 0,
          topP: 1,
          seed: 0n,
          stopIds: [],
        },
        (id) => told.push(id),
      )
      assert.deepEqual(answer, { ids: expected.greedy.continuation, finishReason: 'length' })
      assert.deepEqual(told, expected.greedy.continuation)
      await engine.close()
    },
  )

  for (const method of ['full', 'lora'] as const) {
    test(`golden ${family}: every ${method} gradient equals the reference`, options, async () => {
      const engine = await prepared(family, method)
      const wanted = readTensors(join(goldenFolder(family), `${method}.expected.safetensors`))
      const batch = goldenBatch(family, 0)
      const gradients = await engine.gradients(batch, numTargets(batch))
      const named = [...wanted.keys()].filter((name) => name.startsWith('grad.'))
      assert.equal(gradients.length, named.length)
      for (const { name, values } of gradients) {
        const error = relativeError(values, floats(wanted, `grad.${goldenName(name)}`))
        assert.ok(error <= maxGradientError, `${name}: ${error}`)
      }
      await engine.close()
    })

    test(`golden ${family}: 20 local ${method} steps follow the reference`, options, async () => {
      const engine = await prepared(family, method)
      const start = await engine.weights()
      const reference = expectedOf(family)[
        `${method}_training` as keyof Expected
      ] as TrainingReference
      for (const [index, wanted] of reference.steps.entries()) {
        const batches = [2 * index, 2 * index + 1].map((i) => goldenBatch(family, i % 8))
        const found = await localStep(engine, batches, { step: index + 1, learningRate: wanted.lr })
        assertClose(found.loss, wanted.loss, `loss of step ${index + 1}`)
        assertClose(found.gradNorm, wanted.grad_norm, `gradient norm of step ${index + 1}`)
      }
      const wanted = readTensors(join(goldenFolder(family), `${method}.after20.safetensors`))
      const all = { difference: 0, norm: 0 }
      for (const [index, { name, values }] of (await engine.weights()).entries()) {
        const first = (start[index] as { values: Float32Array }).values
        const { difference, norm } = drift(values, first, floats(wanted, goldenName(name)))
        all.difference += difference
        all.norm += norm
        assert.ok(Math.sqrt(difference / norm) <= 1e-2, `${name}: ${Math.sqrt(difference / norm)}`)
      }
      const error = Math.sqrt(all.difference / all.norm)
      assert.ok(error <= maxDriftError, `all weights: ${error}`)
      await engine.close()
    })
  }
}

/** The golden files leave PEFT's own prefix out. */
const goldenName = (name: string) => name.replace(/^base_model\.model\./, '')

async function prepared(family: string, method: 'full' | 'lora'): Promise<Engine> {
  const engine = await goldenEngine(family)
  const reference = expectedOf(family)[`${method}_training`]
  const spec = method === 'full' ? goldenSpec : goldenLora
  await engine.prepare({ ...spec, weightDecay: reference.weight_decay })
  if (method === 'lora') await engine.loadAdapter(join(goldenFolder(family), 'adapter'))
  return engine
}

function assertClose(found: number, wanted: number, what: string): void {
  const error = Math.abs(found - wanted) / Math.abs(wanted)
  assert.ok(error <= maxLossError, `${what}: ${found}, not ${wanted} (relative ${error})`)
}

function drift(now: Float32Array, start: Float32Array, wanted: Float32Array) {
  let difference = 0
  let norm = 0
  for (const [i, value] of wanted.entries()) {
    difference += ((now[i] as number) - value) ** 2
    norm += (value - (start[i] as number)) ** 2
  }
  return { difference, norm }
}
