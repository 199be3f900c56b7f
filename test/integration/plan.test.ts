import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { BlobStore } from '../../coordinator/blob-store.js'
import { prepareJob } from '../../coordinator/ingest.js'
import { layoutFor, trainRequestJson } from '../../coordinator/job-plan.js'
import { settled } from '../../coordinator/job-precision.js'
import { parseTuning } from '../../coordinator/tuning.js'
import { keyPlaces, readJobFile } from '../../proto/job-file.js'
import type { TrainRequest } from '../../proto/train-spec.js'
import { openEngine } from '../../worker/engine.js'
import { CliProcess, jsonLines } from './cli-process.js'
import { engineMissing, type TemporaryFolder, temporaryFolder } from './temporary-mesh.js'

interface PlanLine {
  memory: { totalBytes: number; uses: { purpose: string; sizeBytes: number }[] }
  numSteps: number
  numTrainedParameters: number
  precision: string
  warnings: string[]
  preflight: { numRows: number; kind: string; samples: unknown[] }
}

describe('tunemesh plan', { skip: engineMissing(), timeout: 120_000 }, () => {
  let folder: TemporaryFolder
  before(() => {
    folder = temporaryFolder()
  })
  after(() => folder.remove())

  const plan = (...args: string[]) =>
    new CliProcess(['--state-dir', folder.stateDir, 'plan', folder.jobPath, ...args]).ended

  async function planned(...args: string[]): Promise<PlanLine> {
    const done = await plan('--json', ...args)
    assert.equal(done.code, 0, done.stderr + done.stdout)
    const line = jsonLines(done.stdout).find((it) => it.type === 'plan')
    return line?.plan as PlanLine
  }

  /** Asked of an engine in this process, without a mesh. */
  async function enginePlan() {
    const file = { text: readFileSync(folder.jobPath, 'utf8'), fileName: 'job.yaml', overrides: [] }
    const blobs = await BlobStore.open(join(folder.stateDir, '..', 'blobs'))
    const prepared = await prepareJob({
      spec: readJobFile(file),
      baseDir: dirname(folder.jobPath),
      jobFileName: file.fileName,
      keyPlaces: keyPlaces(file),
      putBlob: (pieces) => blobs.write(pieces),
    })
    const engine = openEngine({
      modelPath: prepared.modelPath,
      config: prepared.modelConfig,
      numThreads: availableParallelism(),
      instructionPath: 'auto',
      // Base weights are then a mapped file that all workers share, as in a mesh.
      packedCacheDir: join(folder.stateDir, '..', 'packed'),
    })
    const specWith = (layout: Parameters<typeof trainRequestJson>[1]) =>
      (JSON.parse(trainRequestJson(settled(prepared, 'fp32'), layout)) as TrainRequest).spec
    const { numBlocks } = engine.plan(specWith(null))
    const plan = engine.plan(specWith(layoutFor(numBlocks, parseTuning('{}'))))
    await engine.close()
    return plan
  }

  test('memory by purpose is what the engine itself reserves; steps are counted', async () => {
    const { memory, numSteps, preflight, numTrainedParameters, warnings } = await planned()
    const sum = memory.uses.reduce((total, use) => total + use.sizeBytes, 0)
    assert.equal(sum, memory.totalBytes)
    const own = await enginePlan()
    assert.deepEqual(memory, { totalBytes: own.totalBytes, uses: own.uses, layers: own.layers })
    assert.equal(numTrainedParameters, own.numTrainedParameters)
    assert.equal(numSteps, 4)
    assert.deepEqual([preflight.kind, preflight.samples.length], ['messages', 2])
    assert.match(warnings.join('\n'), /only 4 optimizer steps/)
  })

  test('the warning about few steps stands below 50 and not at 50', async () => {
    const [below, at] = [
      await planned('--set', 'max_steps=49'),
      await planned('--set', 'max_steps=50'),
    ]
    assert.deepEqual([below.numSteps, at.numSteps], [49, 50])
    assert.match(below.warnings.join('\n'), /only 49 optimizer steps/)
    assert.deepEqual(at.warnings, [])
  })

  test('for people: data, samples, steps, memory; a mistake is told as train would', async () => {
    const done = await plan()
    assert.equal(done.code, 0, done.stderr)
    for (const part of [
      /^Data .*rows/m,
      /⟦/,
      /4 steps of 2/,
      /for each worker/,
      /Warning .*only 4/,
    ]) {
      assert.match(done.stdout, part)
    }
    const wrong = await plan('--set', 'learning_rat=1')
    assert.equal(wrong.code, 2)
    assert.match(wrong.stderr, /^JOB_INVALID .*learning_rate/m)
  })

  test('bf16: true where the workers use the CPU is refused, auto is float32 there', async () => {
    const done = await plan('--device', 'cpu', '--set', 'bf16=true')
    assert.equal(done.code, 2, done.stdout + done.stderr)
    assert.match(done.stderr, /^JOB_INVALID --set bf16: true needs a GPU; .*CPU.* bf16: auto/m)
    assert.equal((await planned('--device', 'cpu')).precision, 'fp32')
  })
})
