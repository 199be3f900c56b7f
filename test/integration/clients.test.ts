import assert from 'node:assert/strict'
import { execFile, execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { extname, join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { connect, type TunemeshClient } from '../../client/client.js'
import { type EmbeddedCoordinator, startEmbedded } from '../../client/embedded.js'
import {
  engineMissing,
  projectDir,
  type TemporaryFolder,
  temporaryFolder,
} from './temporary-mesh.js'

const run = promisify(execFile)
const clientsDir = join(projectDir(), 'examples', 'clients')
const pythonPackages = ['grpcio==1.85.1', 'grpcio-tools==1.85.1']
const pythonCache = join(
  process.env.XDG_CACHE_HOME || join(homedir(), '.cache'),
  'tunemesh',
  'python',
  'grpcio-1.85.1',
)

describe('example clients: submit, watch, fetch the adapter', { skip: engineMissing() }, () => {
  let folder: TemporaryFolder
  let mesh: EmbeddedCoordinator
  let client: TunemeshClient
  let endpointPath: string

  before(async () => {
    folder = temporaryFolder()
    const { stateDir } = folder
    mesh = await startEmbedded({ stateDir, numWorkers: 1, threadsPerWorker: 1 })
    client = connect({ address: mesh.endpoint.grpc, token: mesh.endpoint.token })
    endpointPath = join(stateDir, 'endpoint.json')
  })
  after(async () => {
    client?.close()
    await mesh?.close()
    folder.remove()
  })

  /** The bytes that the client wrote are those of the newest job's delivered adapter. */
  async function assertAdapter(path: string): Promise<void> {
    const [job] = await client.list(1)
    assert.equal(job?.state, 'SUCCEEDED')
    const hash = createHash('sha256').update(readFileSync(path)).digest('hex')
    assert.equal(`sha256:${hash}`, job?.adapterDigest)
  }

  /** An output folder belongs to one job, so each client has a job file of its own. */
  function ownJob(): string {
    const own = temporaryFolder()
    after(() => own.remove())
    return own.jobPath
  }

  const adapterOf = (name: string) => join(folder.stateDir, `${name}.safetensors`)

  test('TypeScript', async () => {
    const adapter = adapterOf('typescript')
    const example = new URL(
      `../../examples/clients/submit-and-watch${extname(import.meta.url)}`,
      import.meta.url,
    )
    const loader = extname(import.meta.url) === '.ts' ? ['--import', 'tsx'] : []
    const args = [...loader, fileURLToPath(example), endpointPath, ownJob(), adapter]
    const { stdout } = await run(process.execPath, args, { cwd: projectDir() })
    assert.match(stdout, /step 1 loss \d/)
    assert.match(stdout, /step 4 loss \d/)
    await assertAdapter(adapter)
  })

  test('Python', { skip: pythonMissing() }, async () => {
    const adapter = adapterOf('python')
    const args = [join(clientsDir, 'submit_and_watch.py'), endpointPath, ownJob(), adapter]
    const env = { ...process.env, PYTHONPATH: installedPython() }
    const { stdout } = await run('python3', args, { env })
    assert.match(stdout, /step 4 loss \d/)
    await assertAdapter(adapter)
  })

  test('grpcurl', { skip: programMissing('grpcurl', '-version') }, async () => {
    const adapter = adapterOf('grpcurl')
    const text = readFileSync(join(clientsDir, 'grpcurl.md'), 'utf8')
    const script = /```sh\n(.*?)```/s.exec(text)?.[1] ?? ''
    const variables = { ENDPOINT: endpointPath, JOB: ownJob(), ADAPTER: adapter }
    const env = { ...process.env, ...variables }
    const { stdout } = await run('bash', ['-euo', 'pipefail', '-c', script], { env })
    assert.match(stdout, /^tunemesh\.v1\.JobService$/m)
    assert.match(stdout, /"numSteps": 4/)
    await assertAdapter(adapter)
  })
})

function programMissing(program: string, ...args: string[]): string | false {
  try {
    execFileSync(program, args, { stdio: 'ignore' })
    return false
  } catch {
    return `no ${program} found`
  }
}

function pythonMissing(): string | false {
  return programMissing('python3', '-m', 'pip', '--version')
}

/** grpcio in the project's cache, fetched once; a fetch that broke leaves nothing behind. */
function installedPython(): string {
  if (existsSync(pythonCache)) return pythonCache
  const fresh = `${pythonCache}.${process.pid}`
  mkdirSync(fresh, { recursive: true })
  try {
    const pip = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']
    execFileSync('python3', [...pip, '--target', fresh, ...pythonPackages], { stdio: 'inherit' })
    renameSync(fresh, pythonCache)
  } finally {
    rmSync(fresh, { recursive: true, force: true })
  }
  return pythonCache
}
