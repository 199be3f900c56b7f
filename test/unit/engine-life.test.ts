/** Files, errors and the end of an engine's life, through the addon. */
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { TunemeshError } from '../../proto/errors.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import { readTensors } from '../golden-run/safetensors.js'
import {
  expectedOf,
  goldenBatch,
  goldenEngine,
  goldenLora,
  goldenSpec,
  isPresent,
  localStep,
} from './engine-fixture.js'

const family = 'llama-tied'
const options = { skip: isPresent(family) ? false : `test/golden/${family} is absent` }
const batches = [goldenBatch(family, 0), goldenBatch(family, 1)]
const answer = {
  promptIds: Int32Array.from(expectedOf(family).greedy.prompt),
  maxNewTokens: 100,
  temperature: 0,
  topP: 1,
  seed: 0n,
  stopIds: [],
}

function freshFolder(t: TestContext): string {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-engine-'))
  t.after(() => rmSync(folder, { recursive: true }))
  return folder
}

const withCode = (code: string) => (error: unknown) =>
  error instanceof TunemeshError && error.code === code

test('engine: plan() equals what prepare() reserves, for full and LoRA', options, async () => {
  for (const spec of [goldenSpec, goldenLora]) {
    const engine = await goldenEngine(family)
    const plan = engine.plan(spec)
    const { memory, tensors } = await engine.prepare(spec)
    assert.deepEqual(memory, plan)
    assert.equal(
      plan.totalBytes,
      plan.uses.reduce((sum, use) => sum + use.sizeBytes, 0),
    )
    assert.equal(
      plan.numTrainedParameters,
      tensors.reduce((sum, tensor) => sum + tensor.numElements, 0),
    )
    await engine.close()
  }
})

test(
  'engine: a state written after step 1 and read elsewhere gives the same step 2',
  options,
  async (t) => {
    const path = join(freshFolder(t), 'state.safetensors')
    const first = await goldenEngine(family)
    await first.prepare(goldenLora)
    await localStep(first, batches, { step: 1, learningRate: 1e-2 })
    await first.writeState(path, 1)
    const second = await goldenEngine(family, { numThreads: 1 })
    await second.prepare({ ...goldenLora, seed: 77 })
    assert.notEqual(await second.weightsDigest(), await first.weightsDigest())
    assert.deepEqual(await second.readState(path), { step: 1 })
    for (const engine of [first, second]) {
      await localStep(engine, batches, { step: 2, learningRate: 1e-2 })
    }
    assert.equal(await second.weightsDigest(), await first.weightsDigest())
    await Promise.all([first.close(), second.close()])
  },
)

test(
  'engine: a written adapter has the PEFT layout and loads back for training and for generation',
  options,
  async (t) => {
    const folder = freshFolder(t)
    const engine = await goldenEngine(family)
    await engine.prepare(goldenLora)
    await localStep(engine, batches, { step: 1, learningRate: 1e-2 })
    await engine.writeAdapter(folder, 'base-model')
    assert.deepEqual(readdirSync(folder).sort(), [
      'adapter_config.json',
      'adapter_model.safetensors',
    ])
    const config = JSON.parse(readFileSync(join(folder, 'adapter_config.json'), 'utf8'))
    assert.deepEqual(
      [config.peft_type, config.r, config.lora_alpha, config.base_model_name_or_path],
      ['LORA', 4, 8, 'base-model'],
    )
    const name = 'base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight'
    const tensors = readTensors(join(folder, 'adapter_model.safetensors'))
    assert.deepEqual(tensors.get(name)?.shape, [64, 4])

    const again = await goldenEngine(family)
    await again.prepare(goldenLora)
    await again.loadAdapter(folder)
    assert.equal(await again.weightsDigest(), await engine.weightsDigest())
    const tuned = await goldenEngine(family)
    await tuned.loadAdapter(folder)
    const [batch] = batches as [(typeof batches)[0]]
    assert.deepEqual(await tuned.logits(batch), await engine.logits(batch))
    const changes = await engine.weightChange()
    assert.equal(changes.length, 3 * 7)
    assert.equal(changes.filter(({ meanAbsChange }) => !(meanAbsChange > 0)).length, 0)
    assert.equal(
      (await again.weightChange()).filter(({ meanAbsChange }) => meanAbsChange !== 0).length,
      0,
    )
    await Promise.all([engine.close(), again.close(), tuned.close()])
  },
)

test(
  'engine: two engines share one packed file, with the same logits as private weights',
  options,
  async (t) => {
    const packedCacheDir = freshFolder(t)
    const [batch] = batches as [(typeof batches)[0]]
    const apart = await goldenEngine(family)
    const wanted = await apart.logits(batch)
    for (let round = 0; round < 2; round++) {
      const engine = await goldenEngine(family, { packedCacheDir })
      assert.deepEqual(await engine.logits(batch), wanted)
      assert.notEqual(engine.plan(goldenLora).mappedBytes, 0)
      await engine.close()
    }
    assert.equal(readdirSync(packedCacheDir).filter((name) => name.endsWith('.weights')).length, 1)
    await apart.close()
  },
)

test('engine: sampling repeats with its seed and stops at a stop token', options, async () => {
  const engine = await goldenEngine(family)
  const drawn = { ...answer, maxNewTokens: 20, temperature: 5, topP: 0.95, seed: 11n }
  const first = await engine.generate(drawn, () => undefined)
  assert.deepEqual(await engine.generate(drawn, () => undefined), first)
  assert.notDeepEqual(await engine.generate({ ...drawn, seed: 12n }, () => undefined), first)
  const stop = first.ids[3] as number
  const stopped = await engine.generate({ ...drawn, stopIds: [stop] }, () => undefined)
  assert.deepEqual(stopped, {
    ids: first.ids.slice(0, first.ids.indexOf(stop)),
    finishReason: 'stop',
  })
  await engine.close()
})

test(
  'engine: close() frees a job though JavaScript still holds the exchange, which is then refused',
  options,
  async () => {
    const engine = await goldenEngine(family)
    const spec = { ...goldenSpec, tokensPerMicroBatch: 1 << 15 }
    const { memory } = await engine.prepare(spec)
    const exchange = new ExchangeBuffers(engine.exchangeHandle)
    const residentBytes = process.memoryUsage.rss()
    await engine.close()
    const freedBytes = residentBytes - process.memoryUsage.rss()
    // Half: V8 and the test's own allocations may grow meanwhile.
    assert.ok(freedBytes > memory.totalBytes / 2, `${freedBytes} of ${memory.totalBytes} bytes`)
    await assert.rejects(exchange.clearSlot(0), withCode('ENGINE_FAILED'))
    assert.equal(exchange.frame(0, 64).byteLength, 64)
  },
)

test('engine: a generation ends when its signal aborts or the engine closes', options, async () => {
  const engine = await goldenEngine(family)
  // The second one waits behind the first when it is aborted: it must not produce a token.
  const abort = new AbortController()
  const first = engine.generate(answer, () => undefined)
  const second = engine.generate(answer, () => assert.fail('a token came'), abort.signal)
  abort.abort()
  assert.deepEqual(await second, { ids: [], finishReason: 'aborted' })
  assert.equal((await first).finishReason, 'length')
  const running = engine.generate(answer, () => undefined)
  await engine.close()
  assert.match((await running).finishReason, /^(aborted|length)$/)
})

test(
  'engine: closing while a step runs lets it finish and refuses what comes later',
  options,
  async () => {
    const engine = await goldenEngine(family)
    await engine.prepare(goldenSpec)
    const running = engine.microBatch(batches[0] as (typeof batches)[0], 1, { slot: 0 })
    const closed = engine.close()
    assert.equal((await running).numTargetTokens, 42)
    await closed
    await engine.close()
    await assert.rejects(engine.weightsDigest(), withCode('ENGINE_FAILED'))
  },
)

test('engine: what is asked too early or twice is refused by name', options, async () => {
  const engine = await goldenEngine(family)
  await assert.rejects(engine.weightsDigest(), withCode('STATE_CONFLICT'))
  assert.throws(() => engine.exchangeHandle, withCode('STATE_CONFLICT'))
  await engine.prepare(goldenSpec)
  await assert.rejects(engine.prepare(goldenSpec), withCode('STATE_CONFLICT'))
  const empty = {
    tokens: new Int32Array(0),
    targets: new Int32Array(0),
    documentStarts: new Int32Array(1),
  }
  assert.equal((await engine.microBatch(empty, 1, { slot: 0 })).numTargetTokens, 0)
  await engine.close()
})

// What a finished process would hang on or die of can only be seen from outside.
for (const ending of ['prepared', 'in a step', 'in a generation']) {
  test(`engine: a process that exits ${ending} ends well`, options, () => {
    const path = fileURLToPath(import.meta.url)
    const fixture = new URL(
      path.endsWith('.ts') ? 'engine-fixture.ts' : 'engine-fixture.js',
      import.meta.url,
    )
    const program = `
      const { goldenEngine, goldenSpec, goldenBatch } =
        await import(${JSON.stringify(fixture.href)})
      const engine = await goldenEngine('${family}')
      await engine.prepare(goldenSpec)
      const prompt = {
        promptIds: Int32Array.of(1, 2), stopIds: [],
        maxNewTokens: 100, temperature: 0, topP: 1, seed: 0n,
      }
      const numSteps = '${ending}' === 'in a step' ? 20 : 0
      for (let i = 0; i < numSteps; i++) {
        void engine.gradients(goldenBatch('${family}', 0), 1)
      }
      if ('${ending}' === 'in a generation') void engine.generate(prompt, () => undefined)
      if ('${ending}' !== 'prepared') setImmediate(() => process.exit(0))`
    const args = [
      ...process.execArgv.filter((arg) => !arg.startsWith('--test')),
      '--input-type=module',
      '-e',
      program,
    ]
    const done = spawnSync(process.execPath, args, { encoding: 'utf8', timeout: 60_000 })
    assert.deepEqual([done.status, done.signal, done.stderr], [0, null, ''])
  })
}
