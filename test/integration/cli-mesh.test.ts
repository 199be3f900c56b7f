import assert from 'node:assert/strict'
import { existsSync, mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { connect as connectTcp } from 'node:net'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, test } from 'node:test'
import { CliProcess, type CliResult, jsonLines } from './cli-process.js'
import { processesOf, untilGone } from './process-session.js'
import { engineMissing, type TemporaryFolder, temporaryFolder } from './temporary-mesh.js'

const manySteps = 20_000

describe('command line with a mesh of its own', { skip: engineMissing() }, () => {
  let folder: TemporaryFolder
  let temporary: string

  beforeEach(() => newFolder())
  afterEach(() => folder.remove())

  function newFolder(settings: Record<string, string | number> = {}): void {
    folder?.remove()
    folder = temporaryFolder(settings)
    temporary = join(folder.stateDir, '..', 'tmp')
    mkdirSync(temporary)
  }

  const start = (...args: string[]) =>
    new CliProcess(['--state-dir', folder.stateDir, ...args], { TMPDIR: temporary })

  const trainArgs = ['--workers', '2', '--threads', '1', '--json']
  const train = () => start('train', folder.jobPath, ...trainArgs)

  const endpoint = () =>
    JSON.parse(readFileSync(join(folder.stateDir, 'endpoint.json'), 'utf8')) as {
      pid: number
      grpc: string
    }

  async function assertNothingLeft(pid: number, grpc: string): Promise<void> {
    assert.deepEqual(processesOf(pid), [])
    assert.equal(await answers(grpc), false)
    assert.deepEqual(temporaryFiles(), [])
  }

  /** What tsx caches there when the sources run as they are is not ours. */
  const temporaryFiles = () => readdirSync(temporary).filter((name) => !name.startsWith('tsx-'))

  test('train: two workers deliver the adapter, and nothing is left running', async () => {
    const cli = train()
    await cli.until(/"event":"step"/)
    const { pid, grpc } = endpoint()
    assert.ok(processesOf(pid).length >= 4, 'coordinator, nats-server and two workers')
    const done = await cli.ended
    assert.equal(done.code, 0, done.stderr + done.stdout)
    assert.ok(existsSync(join(folder.outputDir, 'adapter_model.safetensors')))
    assert.equal(existsSync(join(folder.stateDir, 'endpoint.json')), false)
    await assertNothingLeft(pid, grpc)

    const listed = await start('jobs', '--json').ended
    const [jobs] = jsonLines(listed.stdout) as [{ jobs: { state: string; step: number }[] }]
    assert.deepEqual(
      jobs.jobs.map((job) => [job.state, job.step]),
      [['SUCCEEDED', 4]],
    )
    const logged = await start('logs', '--json').ended
    const sequences = jsonLines(logged.stdout).map((event) => event.sequence)
    assert.deepEqual(
      sequences,
      sequences.map((_, i) => i + 1),
    )
    const answered = await start('chat', '--prompt', 'What is a wren?', '--json').ended
    assert.equal(answered.code, 0, answered.stderr)
    assert.equal(jsonLines(answered.stdout).at(-1)?.type, 'answer')
  })

  test('train: Ctrl-C stops with a checkpoint; resume ends with the same weights', async () => {
    newFolder({ max_steps: 40 })
    const whole = await train().ended
    assert.equal(whole.code, 0, whole.stderr + whole.stdout)

    newFolder({ max_steps: 40 })
    const cli = train()
    await cli.until(/"event":"step"/)
    const { pid, grpc } = endpoint()
    cli.interrupt()
    const stopped = await cli.ended
    assert.equal(stopped.code, 3, stopped.stderr + stopped.stdout)
    assert.match(stopped.stderr, /Stopping after a checkpoint/)
    assert.equal(jsonLines(stopped.stdout).at(-1)?.type, 'error')
    await assertNothingLeft(pid, grpc)

    const resumed = await start('resume', '--workers', '1', '--json').ended
    assert.equal(resumed.code, 0, resumed.stderr + resumed.stdout)
    assert.equal(weightsOf(resumed), weightsOf(whole))
  })

  test('train: a second Ctrl-C ends everything within seconds', async () => {
    newFolder({ max_steps: manySteps })
    const cli = train()
    await cli.until(/"event":"step"/)
    const { pid, grpc } = endpoint()
    cli.interrupt()
    await cli.until(/Press Ctrl-C again/)
    const pressedMs = performance.now()
    cli.interrupt()
    const done = await cli.ended
    assert.equal(done.code, 3, done.stderr + done.stdout)
    assert.ok(performance.now() - pressedMs < 5_000)
    await assertNothingLeft(pid, grpc)
  })

  test('train: kill -9 of the command line takes the whole mesh with it', async () => {
    newFolder({ max_steps: manySteps })
    const cli = train()
    await cli.until(/"event":"step"/)
    const { pid, grpc } = endpoint()
    cli.child.kill('SIGKILL')
    await cli.ended
    await untilGone(pid)
    await assertNothingLeft(pid, grpc)
  })

  test('train: Ctrl-C while the mesh is still starting leaves nothing either', async () => {
    const cli = train()
    const log = join(folder.stateDir, 'logs', 'coordinator.log')
    // The command line opens the log, then starts the coordinator that writes into it.
    await untilExists(log)
    cli.interrupt()
    const done = await cli.ended
    assert.notEqual(done.code, 0)
    assert.equal(existsSync(join(folder.stateDir, 'endpoint.json')), false)
    assert.deepEqual(temporaryFiles(), [])
  })

  test('train: a device that can not be used ends the job at once, told once', async () => {
    const done = await start('train', folder.jobPath, '--device', 'cuda:999').ended
    assert.equal(done.code, 2, done.stderr + done.stdout)
    assert.match(done.stderr, /^ENGINE_MISSING No worker of this machine can start: /)
    assert.equal((done.stdout + done.stderr).match(/ENGINE_MISSING/g)?.length, 1)
    assert.match(done.stdout, /^failed$/m)
  })

  test('train: a job that queues on the mesh of another train is done before it ends', async () => {
    newFolder({ max_steps: 400 })
    const first = train()
    await first.until(/"event":"step"/)
    const { pid, grpc } = endpoint()
    const other = join(folder.stateDir, '..', 'other-output')
    const args = ['--output-dir', other, '--set', 'max_steps=4', '--json']
    const second = start('train', folder.jobPath, ...args)
    const [one, two] = await Promise.all([first.ended, second.ended])
    assert.equal(two.code, 0, two.stderr + two.stdout)
    assert.equal(one.code, 0, one.stderr + one.stdout)
    assert.match(one.stderr, /stays until job-\w+ ended/)
    assert.ok(existsSync(join(other, 'adapter_model.safetensors')))
    await assertNothingLeft(pid, grpc)
  })

  test('train: two started at once on one folder share the mesh of either', async () => {
    const other = join(folder.stateDir, '..', 'other-output')
    const both = [train(), start('train', folder.jobPath, '--output-dir', other, '--json')]
    for (const done of await Promise.all(both.map((cli) => cli.ended))) {
      assert.equal(done.code, 0, done.stderr + done.stdout)
    }
  })

  test('up: workers come and go, a second mesh on the folder is refused, Ctrl-C ends', async () => {
    const up = start('up', '--workers', '0', '--grpc-port', '0', '--dashboard-port', '0', '--json')
    await up.until(/"type":"mesh"/)
    const { pid, grpc } = endpoint()
    const second = await start('up').ended
    assert.equal(second.code, 2)
    assert.match(second.stderr, /^STATE_IN_USE/)

    assert.match((await start('fleet').ended).stdout, /^No workers/)
    const worker = start('worker', '--threads', '1')
    const watch = start('fleet', '--watch', '--interval', '0.1', '--json')
    await watch.until(/"workerId":"w-/)
    watch.interrupt()
    assert.equal((await watch.ended).code, 0)
    const job = await start('train', folder.jobPath, '--json').ended
    assert.equal(job.code, 0, job.stderr + job.stdout)
    worker.interrupt()
    const left = await worker.ended
    assert.equal(left.code, 0, left.stderr)
    assert.match((await start('fleet').ended).stdout, /w-\w+ .* gone .*\n\n0 workers on 0 hosts/)

    up.interrupt()
    const done = await up.ended
    assert.equal(done.code, 0, done.stderr)
    await assertNothingLeft(pid, grpc)
    const none = await start('fleet').ended
    assert.deepEqual([none.code, none.stdout], [4, ''])
    assert.match(none.stderr, /^COORDINATOR_UNREACHABLE No coordinator runs on/)
  })
})

function weightsOf(done: CliResult): string {
  const result = jsonLines(done.stdout).find((line) => line.type === 'result')
  const job = result?.job as { weightsSha256: string } | undefined
  assert.match(job?.weightsSha256 ?? '', /^[0-9a-f]{64}$/)
  return job?.weightsSha256 ?? ''
}

/** Resolves when a file appears, its folders made meanwhile. */
async function untilExists(path: string): Promise<void> {
  while (!existsSync(path)) await new Promise((resolve) => setImmediate(resolve))
}

function answers(address: string): Promise<boolean> {
  const port = Number(address.split(':')[1])
  return new Promise((resolve) => {
    const socket = connectTcp(port, '127.0.0.1', () => {
      socket.destroy()
      resolve(true)
    })
    socket.once('error', () => resolve(false))
  })
}
