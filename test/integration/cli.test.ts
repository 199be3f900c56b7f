import assert from 'node:assert/strict'
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, afterEach, before, beforeEach, describe, test } from 'node:test'
import { connect } from '../../client/client.js'
import { TunemeshError } from '../../proto/errors.js'
import { CliProcess, jsonLines, runCli } from './cli-process.js'
import { MockCoordinator } from './mock-coordinator.js'

const step = (number: number) => ({
  step: { step: number, numSteps: 4, loss: 3 - number / 4, tokensPerSecond: 800, etaMs: 100 },
})

describe('command line against a coordinator', () => {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-cli-'))
  const jobPath = join(folder, 'job.yaml')
  const base = ['--state-dir', folder]
  let coordinator: MockCoordinator

  before(() => writeFileSync(jobPath, 'model: m\ndata: d.jsonl\n'))
  after(() => rmSync(folder, { recursive: true }))
  afterEach(() => coordinator.stop())
  beforeEach(async () => {
    coordinator = new MockCoordinator()
    await coordinator.start()
    coordinator.publishEndpoint(folder)
  })

  test('train: events as JSON lines, the job at the end, exit 0', async () => {
    coordinator.onSubmit = () => {
      coordinator.pushState('RUNNING')
      coordinator.push(step(1))
      coordinator.push(step(2))
      coordinator.pushState('SUCCEEDED')
    }
    const done = await runCli([...base, 'train', jobPath, '--set', 'r=8', '--json'])
    assert.equal(done.code, 0, done.stderr)
    const lines = jsonLines(done.stdout)
    assert.deepEqual(
      lines.map((line) => line.type),
      ['mesh', 'job', 'event', 'event', 'event', 'event', 'result'],
    )
    assert.deepEqual(
      lines.filter((line) => line.type === 'event').map((line) => line.sequence),
      [1, 2, 3, 4],
    )
    const [request] = coordinator.submits
    assert.deepEqual(request?.overrides, ['r=8'])
    assert.equal(request?.baseDir, folder)
    assert.match(request?.idempotencyKey ?? '', /^[0-9a-f-]{36}$/)
  })

  test('train: waits for a command that only looks at the state folder', async () => {
    coordinator.publishEndpoint(folder, true)
    coordinator.onSubmit = () => coordinator.pushState('SUCCEEDED')
    const cli = new CliProcess([...base, 'train', jobPath])
    await cli.until(/Another command looks at .* waiting up to 10 s for it to end/)
    assert.equal(coordinator.submits.length, 0)
    coordinator.publishEndpoint(folder)
    const done = await cli.ended
    assert.equal(done.code, 0, done.stderr)
    assert.equal(coordinator.submits.length, 1)
  })

  for (const verb of [
    ['train', jobPath],
    ['plan', jobPath],
    ['chat', '--model', 'm'],
  ]) {
    test(`${verb[0]}: Ctrl-C ends the wait for a command that looks`, async () => {
      coordinator.publishEndpoint(folder, true)
      const cli = new CliProcess([...base, ...verb])
      await cli.until(/waiting up to 10 s/)
      cli.interrupt()
      const done = await cli.ended
      assert.equal(done.code, 3, done.stderr)
      assert.match(done.stderr, /Interrupted while waiting for the state folder/)
      assert.equal(coordinator.submits.length, 0)
    })
  }

  test('train: a mistake in the job file is found before a coordinator is looked for', async () => {
    const done = await runCli(['--server', '127.0.0.1:1', 'train', jobPath, '--set', 'learnin=1'])
    assert.equal(done.code, 2, done.stderr)
    assert.match(done.stderr, /^JOB_INVALID --set learnin: there is no such key/)
  })

  test('train: plain lines for people, ending with where the result is', async () => {
    coordinator.job.artifacts = [{ path: 'adapter_model.safetensors', digest: 'd', sizeBytes: 1 }]
    coordinator.onSubmit = () => {
      coordinator.push(step(1))
      coordinator.pushState('SUCCEEDED')
    }
    const done = await runCli([...base, 'train', jobPath])
    assert.equal(done.code, 0, done.stderr)
    assert.match(done.stdout, /step 1\/4 {2}loss 2\.7500/)
    assert.match(done.stdout, /Adapter {4}\/out\/adapter_model\.safetensors/)
    assert.doesNotMatch(done.stdout, /\x1b/)
  })

  test('train: every problem of a refused job is shown, exit 2, no stack', async () => {
    coordinator.refusal = new TunemeshError('JOB_INVALID', '2 problems in job.yaml', {
      details: [
        'job.yaml:1 learning_rat: unknown key. Did you mean learning_rate?',
        'job.yaml:2 x',
      ],
    })
    const done = await runCli([...base, 'train', jobPath])
    assert.equal(done.code, 2)
    assert.match(done.stderr, /^JOB_INVALID 2 problems in job\.yaml$/m)
    assert.match(done.stderr, /^ {2}job\.yaml:1 learning_rat: unknown key/m)
    assert.doesNotMatch(done.stderr, /^\s+at /m)
  })

  test('train: a failed job gives its own code and exit 3', async () => {
    const error = { code: 'NON_FINITE_GRADIENT', message: 'step 2, micro-batch 1', details: [] }
    coordinator.onSubmit = () => {
      coordinator.job.error = error
      coordinator.push({ stateChanged: { state: 'FAILED', error } })
    }
    const done = await runCli([...base, 'train', jobPath, '--json'])
    assert.equal(done.code, 3)
    assert.deepEqual(jsonLines(done.stdout).at(-1), { type: 'error', error })
  })

  test('train: a coordinator that restarts leaves no gap and no duplicate', async () => {
    coordinator.onSubmit = () => coordinator.push(step(1))
    const cli = new CliProcess([...base, 'train', jobPath, '--json'])
    await cli.until(/"sequence":1/)
    await coordinator.restart()
    coordinator.push(step(2))
    coordinator.pushState('SUCCEEDED')
    const done = await cli.ended
    assert.equal(done.code, 0, done.stderr)
    const events = jsonLines(done.stdout).filter((line) => line.type === 'event')
    assert.deepEqual(
      events.map((event) => event.sequence),
      [1, 2, 3],
    )
    assert.equal(coordinator.cursors.at(-1), 1)
  })

  test('train: Ctrl-C asks to stop and says how to go on, exit 3', async () => {
    coordinator.onSubmit = () => coordinator.push(step(1))
    coordinator.onStop = () => coordinator.pushState('STOPPED')
    const cli = new CliProcess([...base, 'train', jobPath])
    await cli.until(/step 1\/4/)
    cli.interrupt()
    const done = await cli.ended
    assert.equal(done.code, 3)
    assert.deepEqual(
      coordinator.stops.map((stop) => stop.now),
      [false],
    )
    assert.match(done.stderr, /tunemesh resume j-1/)
  })

  test('train: a second Ctrl-C stops at once although the job goes on', async () => {
    coordinator.onSubmit = () => coordinator.push(step(1))
    const cli = new CliProcess([...base, 'train', jobPath])
    await cli.until(/step 1\/4/)
    cli.interrupt()
    await cli.until(/Press Ctrl-C again/)
    cli.interrupt()
    const done = await cli.ended
    assert.equal(done.code, 3)
    assert.deepEqual(
      coordinator.stops.map((stop) => stop.now),
      [false, true],
    )
    assert.match(done.stderr, /last checkpoint is kept.*tunemesh resume j-1/s)
  })

  test('logs -f: Ctrl-C leaves the job alone, exit 0', async () => {
    coordinator.push({ log: { level: 'info', message: 'hello \x1b[31mred' } })
    const cli = new CliProcess([...base, 'logs', '-f'])
    await cli.until(/hello \\x1b\[31mred/)
    cli.interrupt()
    const done = await cli.ended
    assert.equal(done.code, 0)
    assert.equal(coordinator.stops.length, 0)
    assert.match(done.stderr, /the job goes on/)
  })

  test('logs of a live job: what is stored, from the first event, exit 0', async () => {
    coordinator.pushState('RUNNING')
    const cli = new CliProcess([...base, 'logs', '--json'])
    await cli.until(/"sequence":1/)
    coordinator.push(step(1))
    const done = await cli.ended
    assert.equal(done.code, 0, done.stderr)
    assert.equal(done.stderr, '')
    assert.deepEqual(
      jsonLines(done.stdout).map((line) => line.sequence),
      [1, 2],
    )
  })

  test('jobs --server: a wrong token is refused with its code, exit 2', async () => {
    const args = ['--server', coordinator.address, 'jobs']
    const done = await runCli([...base, ...args], { TUNEMESH_TOKEN: 'wrong' })
    assert.equal(done.code, 2)
    assert.match(done.stderr, /^NOT_AUTHENTICATED/)
    const right = await runCli([...base, ...args], { TUNEMESH_TOKEN: coordinator.token })
    assert.equal(right.code, 0, right.stderr)
    assert.match(right.stdout, /j-1 +mock +queued/)
  })

  test('jobs --server: nobody there is exit 4', async () => {
    const { address } = coordinator
    coordinator.stop()
    const done = await runCli(['--server', address, 'jobs'], { TUNEMESH_TOKEN: 't' })
    assert.equal(done.code, 4)
    assert.match(done.stderr, /^COORDINATOR_UNREACHABLE/)
  })

  test('blobs: a fetch that breaks goes on where it was, to the right bytes', async () => {
    const data = Buffer.from(Array.from({ length: 12_345 }, (_, i) => (i * 31) % 251))
    const digest = coordinator.putBlob(data)
    coordinator.breakGetAfter = 5_000
    const client = connect({ address: coordinator.address, token: coordinator.token })
    const path = join(folder, 'fetched', 'adapter_model.safetensors')
    await client.blobs.fetch(digest, path)
    assert.deepEqual(readFileSync(path), data)
    assert.deepEqual(coordinator.blobOffsets.slice(0, 1), [0])
    assert.equal(coordinator.blobOffsets.length, 2)
    assert.ok((coordinator.blobOffsets[1] ?? 0) > 0)
    assert.equal(existsSync(`${path}.part`), false)
    client.close()
  })

  test('blobs: bytes that are not those of the digest are refused and not kept', async () => {
    const digest = coordinator.putBlob(Buffer.from('right'))
    coordinator.blobs.set(digest, Buffer.from('wrong'))
    const client = connect({ address: coordinator.address, token: coordinator.token })
    const path = join(folder, 'bad')
    await assert.rejects(client.blobs.fetch(digest, path), { code: 'DIGEST_MISMATCH' })
    assert.equal(existsSync(path) || existsSync(`${path}.part`), false)
    client.close()
  })
})
