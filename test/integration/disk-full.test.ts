import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { closeSync, existsSync, mkdirSync, openSync, readdirSync, rmSync, writeSync } from 'node:fs'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { TestCoordinator, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'
import { engineMissing } from './temporary-mesh.js'

const stateDir = temporaryFolder()
const blobsDir = join(stateDir, 'blobs')

/** A disk of its own for the blobs, so that filling it hurts nobody; false where not allowed. */
function mountSmallDisk(): boolean {
  mkdirSync(blobsDir, { mode: 0o700 })
  const mount = spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', blobsDir])
  return mount.status === 0
}

/** Takes all room that is left; the file goes on holding it until it is removed. */
function fill(path: string): void {
  const file = openSync(path, 'w')
  for (const size of [1 << 20, 1 << 12]) {
    const piece = Buffer.alloc(size)
    try {
      for (;;) writeSync(file, piece)
    } catch (error) {
      assert.equal((error as NodeJS.ErrnoException).code, 'ENOSPC')
    }
  }
  closeSync(file)
}

const isMounted = engineMissing() === false && mountSmallDisk()
const missing = engineMissing() || (isMounted ? false : 'a small disk can be mounted by root only')

describe('a disk that is full at a checkpoint', { skip: missing, timeout: 120_000 }, () => {
  const outputs = temporaryFolder()
  let coordinator: TestCoordinator

  before(async () => {
    const tuning = { limits: { checkpointRetryMs: 3_600_000 } }
    coordinator = await TestCoordinator.open({ workers: 1, stateDir, tuning })
  })
  after(async () => {
    await coordinator.close()
    spawnSync('umount', ['-l', blobsDir])
    rmSync(stateDir, { recursive: true, force: true })
    rmSync(outputs, { recursive: true, force: true })
  })

  test('pauses the job with the last checkpoint kept; it goes on when there is room', async () => {
    const { client } = coordinator
    const filler = join(blobsDir, 'filler')
    const settings = { max_steps: 400, save_steps: 20, gradient_accumulation_steps: 1 }
    const job = await client.submit(tinyJob(join(outputs, 'output'), settings))
    const checkpoints = join(blobsDir, 'checkpoints', job.jobId)
    let keptBefore: string[] = []
    let pausedWith = ''
    for await (const event of client.watch(job.jobId)) {
      if (event.checkpoint && !existsSync(filler) && pausedWith === '') {
        keptBefore = readdirSync(checkpoints).filter((name) => name.startsWith('step-'))
        fill(filler)
      }
      if (event.stateChanged?.state === 'PAUSED') {
        pausedWith = event.stateChanged.error?.code ?? ''
        const kept = readdirSync(checkpoints).filter((name) => name.startsWith('step-'))
        assert.ok(keptBefore.length > 0 && keptBefore.every((name) => kept.includes(name)))
        assert.equal((await client.get(job.jobId)).error?.code, 'DISK_FULL')
        rmSync(filler)
        await client.resume(job.jobId)
      }
    }
    assert.equal(pausedWith, 'DISK_FULL')
    const ended = await client.get(job.jobId)
    assert.deepEqual([ended.state, ended.step, ended.error], ['SUCCEEDED', 400, null])
  })
})
