import assert from 'node:assert/strict'
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { after, afterEach, before, describe, test } from 'node:test'
import { examplesDir, TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'
import { WorkerProcess } from './worker-process.js'

const skip = engineMissing() || (process.getuid?.() === 0 ? false : 'mount namespaces need root')
const modelFiles = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']

describe('a worker that shares no folder with the coordinator', { skip, timeout: 180_000 }, () => {
  const folder = temporaryFolder()
  const model = join(folder, 'model')
  const cache = join(folder, 'cache')
  let coordinator: TestCoordinator
  let worker: WorkerProcess
  let numJobs = 0
  let visible = { jobId: '', weightsSha256: '' }

  before(async () => {
    mkdirSync(model)
    for (const name of modelFiles) cpSync(join(examplesDir, 'tiny-llama', name), join(model, name))
    coordinator = await TestCoordinator.open()
  })
  afterEach(() => worker.discard())
  after(async () => {
    await coordinator.kill()
    coordinator.removeState()
    rmSync(folder, { recursive: true, force: true })
  })

  /** In a mount namespace of its own, where other things lie over what the coordinator has. */
  const startBehind = (mounts: string[], cacheDir = cache) =>
    new WorkerProcess(coordinator, {
      token: coordinator.ready.token,
      wrapper: ['unshare', '-m', '-u', 'sh', '-c', `${mounts.join(' && ')} && exec "$@"`, 'sh'],
      env: { XDG_CACHE_HOME: cacheDir },
    })
  const hideState = () => `mount -t tmpfs none ${coordinator.stateDir}`
  const startHidden = () =>
    startBehind(['hostname elsewhere', hideState(), `mount -t tmpfs none ${model}`])

  async function train(settings: Record<string, unknown> = {}) {
    const outputDir = join(folder, `output-${++numJobs}`)
    const { jobId } = await coordinator.client.submit(tinyJob(outputDir, { model, ...settings }))
    for await (const _ of coordinator.client.watch(jobId));
    const { state, error, weightsSha256 } = await coordinator.client.get(jobId)
    assert.deepEqual([state, error], ['SUCCEEDED', null], worker.stderr)
    return { jobId, weightsSha256, outputDir }
  }

  /** Not the one of the test before, whose loss may not have been noticed yet. */
  async function attached(): Promise<void> {
    const isNew = ({ processId }: { processId: number }) => processId === worker.child.pid
    while (!(await coordinator.client.listWorkers()).some(isNew));
  }

  async function answerOf(request: object): Promise<number[]> {
    const ids: number[] = []
    const asked = { promptIds: [5, 6, 7], maxNewTokens: 8, ...request }
    for await (const { tokenIds } of coordinator.client.generate(asked)) ids.push(...tokenIds)
    return ids
  }

  test('one that sees the files reads them in place', async () => {
    worker = new WorkerProcess(coordinator, { env: { XDG_CACHE_HOME: cache } })
    visible = await train()
    assert.doesNotMatch(worker.stderr, /fetch/)
  })

  test('one that does not fetches them by digest and trains to the same bits', async () => {
    worker = startHidden()
    assert.equal((await train()).weightsSha256, visible.weightsSha256)
    assert.match(worker.stderr, /fetching 4 files/)
    const [key = ''] = readdirSync(join(cache, 'tunemesh', 'models'))
    for (const name of modelFiles) {
      const fetched = readFileSync(join(cache, 'tunemesh', 'models', key, name))
      assert.deepEqual(fetched, readFileSync(join(model, name)), name)
    }
  })

  test('the next job finds them; a full model is delivered with its tokenizer', async () => {
    worker = startHidden()
    const { outputDir } = await train({ finetuning: 'full', max_steps: 2 })
    assert.doesNotMatch(worker.stderr, /fetching/)
    for (const name of modelFiles.filter((name) => name.endsWith('.json'))) {
      assert.deepEqual(readFileSync(join(outputDir, name)), readFileSync(join(model, name)), name)
    }
  })

  test('chat with a job, and with a model by path, as on a worker that sees them', async () => {
    worker = new WorkerProcess(coordinator, { env: { XDG_CACHE_HOME: cache } })
    await attached()
    const expected = [await answerOf({ jobId: visible.jobId }), await answerOf({ model })]
    await worker.discard()
    worker = startHidden()
    await attached()
    assert.deepEqual(
      [await answerOf({ jobId: visible.jobId }), await answerOf({ model })],
      expected,
    )
  })

  test('a file at the same path with other bytes is not read, but fetched', async () => {
    const copy = join(folder, 'copy')
    cpSync(model, copy, { recursive: true })
    writeFileSync(join(copy, 'tokenizer_config.json'), '{}')
    // The same size: only the digest tells.
    const weights = readFileSync(join(copy, 'model.safetensors'))
    weights[weights.length - 1] = (weights.at(-1) ?? 0) ^ 1
    writeFileSync(join(copy, 'model.safetensors'), weights)
    worker = startBehind([`mount --bind ${copy} ${model}`], join(folder, 'other-cache'))
    assert.equal((await train()).weightsSha256, visible.weightsSha256)
    assert.match(worker.stderr, /model\.safetensors is not the coordinator's file of that name/)
    assert.match(worker.stderr, /fetching 2 files/)
  })
})
