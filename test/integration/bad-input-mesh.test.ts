import assert from 'node:assert/strict'
import { chmodSync, existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { CliProcess, jsonLines } from './cli-process.js'
import { type TemporaryFolder, temporaryFolder } from './temporary-mesh.js'

/** What prevents a mesh from starting, as the user sees it. */
describe('a mesh that cannot start', { timeout: 120_000 }, () => {
  let folder: TemporaryFolder
  const binDir = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  const taken: Server = createServer()
  let takenPort = 0

  before(async () => {
    folder = temporaryFolder()
    await new Promise<void>((resolve) => taken.listen(0, '127.0.0.1', resolve))
    takenPort = (taken.address() as { port: number }).port
  })
  after(() => {
    taken.close()
    folder.remove()
    rmSync(binDir, { recursive: true, force: true })
  })

  /** A program that answers as nats-server of some version. */
  function fakeServer(version: string): string {
    const path = join(binDir, `nats-server-${version}`)
    writeFileSync(path, `#!/bin/sh\necho "nats-server: v${version}"\n`)
    chmodSync(path, 0o755)
    return path
  }

  async function refused(args: string[], env: NodeJS.ProcessEnv = {}) {
    const done = await new CliProcess(['--state-dir', folder.stateDir, ...args, '--json'], env)
      .ended
    const error = jsonLines(done.stdout).at(-1)?.error as { code: string; message: string }
    assert.equal(done.code, 2, done.stderr + done.stdout)
    assert.equal(existsSync(join(folder.stateDir, 'endpoint.json')), false)
    assert.equal(existsSync(folder.outputDir), false)
    return error
  }

  test('nats-server missing: where one is named, what to do', async () => {
    const env = { TUNEMESH_NATS_SERVER: join(binDir, 'nowhere') }
    const { code, message } = await refused(['train', folder.jobPath], env)
    assert.equal(code, 'NATS_SERVER_MISSING')
    assert.match(message, /nowhere.*npm run setup/)
  })

  test('nats-server too old: both versions are named', async () => {
    const env = { TUNEMESH_NATS_SERVER: fakeServer('2.9.1') }
    const { code, message } = await refused(['train', folder.jobPath], env)
    assert.equal(code, 'NATS_SERVER_TOO_OLD')
    assert.match(message, /at least 2\.\d+.*2\.9\.1/)
  })

  for (const option of ['--grpc-port', '--dashboard-port']) {
    test(`${option} taken: the port is named, and nothing is left`, async () => {
      const other = option === '--grpc-port' ? '--dashboard-port' : '--grpc-port'
      const ports = [option, String(takenPort), other, '0']
      const { code, message } = await refused(['up', '--workers', '0', ...ports])
      assert.equal(code, 'PORT_TAKEN')
      assert.ok(message.includes(String(takenPort)), message)
    })
  }

  test('no job file, and a job file that is no YAML', async () => {
    const missing = await refused(['train', join(binDir, 'nowhere.yaml')])
    assert.equal(missing.code, 'JOB_INVALID')
    assert.match(missing.message, /nowhere\.yaml/)
    const path = join(binDir, 'broken.yaml')
    writeFileSync(path, 'model: [\n')
    const broken = await refused(['train', path])
    assert.equal(broken.code, 'JOB_INVALID')
    assert.match(broken.message, /broken\.yaml/)
  })
})
