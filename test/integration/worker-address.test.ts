import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { CliProcess } from './cli-process.js'
import { WorkerProcess } from './worker-process.js'

describe('a coordinator on another machine, without TLS', { timeout: 60_000 }, () => {
  const grpc = 'coordinator.invalid:8471'
  let folder = ''

  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
    writeFileSync(join(folder, 'token'), 'secret')
  })
  after(() => rmSync(folder, { recursive: true, force: true }))

  test('tunemesh worker refuses it before a process starts', async () => {
    const named = ['--state-dir', folder, '--token-file', join(folder, 'token')]
    const done = await new CliProcess(['worker', ...named, '--join', grpc]).ended
    assert.equal(done.code, 2)
    assert.match(done.stderr, /TLS_REQUIRED.*coordinator\.invalid/)
    assert.doesNotMatch(done.stderr, /Joining/)
  })

  test('the worker itself sends its token nowhere', async () => {
    const ready = { grpc } as ConstructorParameters<typeof WorkerProcess>[0]['ready']
    const worker = new WorkerProcess({ ready, stateDir: folder })
    assert.equal(await worker.ended, 1)
    assert.match(worker.stderr, /NOT_AUTHENTICATED/)
    worker.removeFolder()
  })
})
