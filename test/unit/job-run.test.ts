import assert from 'node:assert/strict'
import { Readable } from 'node:stream'
import { describe, it } from 'node:test'
import { type RunParts, startRun } from '../../coordinator/job-run.js'
import { TunemeshError } from '../../proto/errors.js'

/** A run whose start is told when the test says so; what it reads first fails as `error`. */
function runThatFails(error: TunemeshError) {
  let tell = () => {}
  const told = new Promise<void>((resolve) => {
    tell = resolve
  })
  const read = () => Readable.from([]).destroy(error)
  const parts = {
    mesh: { blobs: { read }, options: { tuning: {} }, fleet: { want: () => {} } },
    job: { preparedDigest: 'd' },
    told,
  }
  return { run: startRun(parts as unknown as RunParts), tell }
}

describe('a run that is stopped while it is planned', () => {
  it('is stopped when the stop is what ended it', async () => {
    const { run, tell } = runThatFails(new TunemeshError('JOB_STOPPED', 'stopped'))
    run.stop(false)
    tell()
    assert.deepEqual(await run.outcome, { state: 'STOPPED' })
  })

  it('has failed when it could not have run', async () => {
    const { run, tell } = runThatFails(new TunemeshError('BLOB_NOT_FOUND', 'gone'))
    run.stop(false)
    tell()
    await assert.rejects(run.outcome, { code: 'BLOB_NOT_FOUND' })
  })
})
