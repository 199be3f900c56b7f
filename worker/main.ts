/**
 * `worker/main.js`: reads its options once and runs a worker. Started by the coordinator or by
 * `tunemesh worker`.
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { homedir, hostname, tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import pino from 'pino'
import { errorLine } from '../proto/error-line.js'
import { TunemeshError } from '../proto/errors.js'
import { armFailpoints } from '../proto/failpoint.js'
import { joinedAccess, loopbackAccess } from './coordinator-access.js'
import { chooseDevice, listGpus, unusedGpu } from './device.js'
import { Worker } from './worker.js'

const { values } = parseArgs({
  options: {
    coordinator: { type: 'string' },
    'token-file': { type: 'string' },
    /** Instead of a token: the file of a host that has joined, and TLS. */
    joined: { type: 'string' },
    threads: { type: 'string', default: '0' },
    'work-dir': { type: 'string' },
    'instruction-path': { type: 'string', default: 'auto' },
    /** "auto" (a GPU where there is one), "cpu", "cuda:0" and so on. */
    device: { type: 'string', default: 'auto' },
    /** Which of a machine's workers this is: they take its GPUs in turn. */
    'device-index': { type: 'string', default: '0' },
    /** Its place among the workers of this host that use the device; kept over restarts. */
    place: { type: 'string', default: '' },
    /** Where a GPU's libraries are looked for first. */
    'library-folder': { type: 'string', default: '' },
    'give-up-after': { type: 'string', default: '600' },
    /** Ends when its standard input closes: the parent is gone, however it died. */
    'end-with-parent': { type: 'boolean', default: false },
    /** Only tells the machine's GPUs, as one JSON line. */
    'list-gpus': { type: 'boolean', default: false },
    /** Allows `--failpoints` and `--tuning`; for tests only. */
    testing: { type: 'boolean', default: false },
    failpoints: { type: 'string', default: '' },
    tuning: { type: 'string', default: '{}' },
  },
})

const log = pino(
  { name: 'worker', level: process.env.TUNEMESH_LOG_LEVEL ?? 'info' },
  pino.destination(2),
)
const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')

interface WorkerTuning {
  doubtAfterMs?: number
  requestSumEveryMs?: number
  /** GPU: false issues every call of a step by itself; the bits are the same. */
  graphs?: boolean
}

/** Of each of the two folders; null: their defaults. */
function cacheBytesOf(text: string | undefined): number | null {
  if (!text) return null
  const gib = Number(text)
  if (gib > 0 && Number.isFinite(gib)) return Math.floor(gib * 2 ** 30)
  throw new TunemeshError(
    'JOB_INVALID',
    `TUNEMESH_CACHE_GIB is "${text}": give a number of GiB above 0, such as 20, or unset it.`,
  )
}

function workerOptions() {
  const cacheBytes = cacheBytesOf(process.env.TUNEMESH_CACHE_GIB)
  if (!values.coordinator || (!values['token-file'] && !values.joined))
    throw new TunemeshError(
      'JOB_INVALID',
      'worker needs --coordinator HOST:PORT and --token-file or --joined',
    )
  if (!values.testing && (values.failpoints !== '' || values.tuning !== '{}'))
    throw new TunemeshError('JOB_INVALID', '--failpoints and --tuning are for tests: add --testing')
  armFailpoints(values.failpoints)
  const { graphs, ...tuning } = JSON.parse(values.tuning) as WorkerTuning
  const device = chooseDevice(values.device, Number(values['device-index']))
  const unused = unusedGpu(values.device, device)
  if (unused !== '') log.warn(`computes on the CPU although this machine has a GPU: ${unused}`)
  const workDir = values['work-dir'] ?? mkdtempSync(join(tmpdir(), 'tunemesh-worker-'))
  // However this process ends, short of kill -9: its parent gone, a failure before it attached.
  process.once('exit', () => rmSync(workDir, { recursive: true, force: true }))
  return {
    coordinator: values.coordinator,
    access: values.joined
      ? joinedAccess(values.joined, Date.now())
      : loopbackAccess(values.coordinator, readFileSync(values['token-file'] ?? '', 'utf8').trim()),
    host: hostname(),
    place: values.place,
    workDir,
    modelCacheDir: join(cacheDir, 'models'),
    modelCacheBytes: cacheBytes,
    device: {
      numThreads: Number(values.threads),
      instructionPath: values['instruction-path'] as 'auto',
      packedCacheDir: join(cacheDir, 'packed'),
      ...(cacheBytes === null ? {} : { packedCacheBytes: cacheBytes }),
      device,
      unusedGpu: unused,
      libraryFolder: values['library-folder'],
      ...(graphs === undefined ? {} : { recordsCalls: graphs }),
    },
    giveUpAfterMs: Number(values['give-up-after']) * 1000,
    doubtAfterMs: 5_000,
    requestSumEveryMs: 1_000,
    ...tuning,
    log: (level: 'info' | 'warn' | 'error', message: string) => log[level](message),
  }
}

try {
  if (values['list-gpus']) {
    process.stdout.write(`${JSON.stringify(listGpus(values['library-folder']))}\n`)
    process.exit(0)
  }
  const worker = new Worker(workerOptions())
  process.once('SIGTERM', () => worker.drain('SIGTERM'))
  process.once('SIGINT', () => worker.drain('SIGINT'))
  if (values['end-with-parent']) {
    process.stdin.resume()
    process.stdin.once('end', () => process.exit(0))
    process.stdin.once('error', () => process.exit(0))
  }
  await worker.run()
  process.exit(0)
} catch (error) {
  log.error(error instanceof TunemeshError ? `${error.code} ${error.message}` : error)
  process.stdout.write(errorLine(error))
  process.exit(1)
}
