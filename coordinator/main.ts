/**
 * `coordinator/main.js`: reads its options once and runs a coordinator until a signal, or until its
 * parent is gone. The first line on stdout is JSON: what came up, or the error that prevented it.
 */
import { homedir } from 'node:os'
import { dirname, join, resolve } from 'node:path'
import tls from 'node:tls'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import pino from 'pino'
import { TunemeshError } from '../proto/errors.js'
import { armFailpoints } from '../proto/failpoint.js'
import { type Coordinator, type CoordinatorOptions, startCoordinator } from './coordinator.js'
import { parseListenAddress } from './listen-address.js'
import { parseTuning } from './tuning.js'

const env = process.env
const log = pino(
  { name: 'coordinator', level: env.TUNEMESH_LOG_LEVEL ?? 'info' },
  pino.destination(2),
)

// Both ends are ours: nothing older is spoken.
tls.DEFAULT_MIN_VERSION = 'TLSv1.3'

const { values } = parseArgs({
  options: {
    'state-dir': { type: 'string', default: '' },
    workers: { type: 'string', default: '0' },
    'threads-per-worker': { type: 'string', default: '0' },
    device: { type: 'string', default: 'auto' },
    'grpc-port': { type: 'string', default: '0' },
    'dashboard-port': { type: 'string', default: '0' },
    'no-dashboard': { type: 'boolean', default: false },
    /** HOST or HOST:PORT where workers of other hosts may join; empty: loopback only. */
    listen: { type: 'string', default: '' },
    /** In seconds, of the join token told at the start. */
    'token-ttl': { type: 'string', default: '3600' },
    'nats-server': { type: 'string', default: '' },
    /** Only looks at the state folder: nothing queued is run. */
    hold: { type: 'boolean', default: false },
    'end-with-parent': { type: 'boolean', default: false },
    /** Allows --tuning. */
    testing: { type: 'boolean', default: false },
    tuning: { type: 'string', default: '{}' },
  },
})

function readOptions(): CoordinatorOptions {
  if (!values.testing && values.tuning !== '{}') {
    throw new TunemeshError('JOB_INVALID', '--tuning is for tests only: add --testing.')
  }
  const tuning = parseTuning(values.tuning)
  armFailpoints(tuning.failpoints)
  const state = env.XDG_STATE_HOME || join(homedir(), '.local', 'state')
  const cache = join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')
  return {
    stateDir: resolve(values['state-dir'] || env.TUNEMESH_HOME || join(state, 'tunemesh')),
    natsServer: values['nats-server'] || env.TUNEMESH_NATS_SERVER || '',
    path: env.PATH ?? '',
    natsCacheDir: join(cache, 'nats-server'),
    grpcPort: portOf('grpc-port'),
    listen: values.listen === '' ? null : parseListenAddress(values.listen),
    joinTokenTtlMs: Math.max(1, countOf('token-ttl', 30 * 86_400)) * 1_000,
    dashboardPort: values['no-dashboard'] ? null : portOf('dashboard-port'),
    dashboardDir: pagesDir(),
    numWorkers: countOf('workers', 64),
    threadsPerWorker: countOf('threads-per-worker', 1024),
    device: values.device,
    workerEnv: { ...env, TUNEMESH_TOKEN: undefined },
    isHeld: values.hold,
    tuning,
    log,
  }
}

/** Beside this file in build/; from the sources, where the build puts it. */
function pagesDir(): string {
  const here = dirname(fileURLToPath(import.meta.url))
  const isBuilt = dirname(here).endsWith(`${join('/', 'build')}`)
  return isBuilt ? join(here, '..', 'page') : join(here, '..', 'build', 'page')
}

const portOf = (name: 'grpc-port' | 'dashboard-port') => countOf(name, 65_535)

function countOf(name: keyof typeof values, most: number): number {
  const number = Number(values[name])
  if (Number.isInteger(number) && number >= 0 && number <= most) return number
  throw new TunemeshError(
    'JOB_INVALID',
    `--${name} ${values[name]} is not an integer from 0 to ${most}.`,
  )
}

const say = (line: object) => process.stdout.write(`${JSON.stringify(line)}\n`)

function failed(error: unknown): number {
  const known = error instanceof TunemeshError
  if (known) log.error(`${error.code} ${error.message}`)
  else log.error({ err: error }, 'the coordinator failed')
  const code = known ? error.code : 'INTERNAL'
  const message = known ? error.message : 'The coordinator failed unexpectedly; see its log.'
  say({ ready: false, error: { code, message, details: known ? error.details : [] } })
  return 1
}

/** Resolves with why it must end: the parent is gone, a signal, or it can not go on. */
function endAsked(coordinator: Coordinator): Promise<TunemeshError | null> {
  return new Promise((resolve) => {
    process.once('SIGTERM', () => resolve(null))
    process.once('SIGINT', () => resolve(null))
    void parentGone.then(() => resolve(null))
    void coordinator.lost.then(resolve)
  })
}

const parentGone = new Promise<void>((resolve) => {
  if (!values['end-with-parent']) return
  process.stdin.resume()
  process.stdin.once('end', resolve)
  process.stdin.once('error', () => resolve())
})
// Nobody may be left to read it.
process.stdout.on('error', () => {})

async function main(): Promise<number> {
  const options = readOptions()
  const coordinator = await startCoordinator(options)
  const { grpc, token, dashboard, join: joinLine } = coordinator
  // A token on a terminal would stay in its history; a parent reads it from our pipe.
  const shown = values['end-with-parent']
    ? { token, join: joinLine }
    : { tokenFile: join(options.stateDir, 'token') }
  say({ ready: true, grpc, dashboard, pid: process.pid, ...shown })
  const reason = await endAsked(coordinator)
  process.once('SIGINT', () => process.exit(130))
  await coordinator.stop()
  return reason === null ? 0 : failed(reason)
}

try {
  process.exitCode = await main()
} catch (error) {
  process.exitCode = failed(error)
}
process.exit()
