/** The fleet as tables: hosts, then workers. Pure. */
import type { WorkerInfo } from '../client/client.js'
import { escapeLine, shorten } from './escape.js'
import { formatBytes, formatDuration, formatPercent, formatRate } from './format.js'
import { table } from './style.js'

/** Longest text of what a device is or a worker does; --json has all of it. */
const longestText = 56

export function renderFleet(workers: WorkerInfo[]): string[] {
  const attached = workers.filter(({ state }) => state !== 'gone')
  if (workers.length === 0) return ['No workers. Start one: tunemesh worker']
  return [...hostTable(attached), ...workerTable(workers), '', totals(attached)]
}

function hostTable(workers: WorkerInfo[]): string[] {
  const hosts = new Map<string, WorkerInfo[]>()
  for (const worker of workers) {
    hosts.set(hostOf(worker), [...(hosts.get(hostOf(worker)) ?? []), worker])
  }
  const rows = [...hosts].map(([host, [first, ...others]]) => [
    host,
    String(1 + others.length),
    first?.version ?? '',
    escapeLine(first?.system ?? ''),
    (first?.libraries ?? []).map(withoutPath).map(escapeLine).join('; '),
  ])
  if (rows.length === 0) return []
  return [...table([['HOST', 'WORKERS', 'VERSION', 'SYSTEM', 'LIBRARIES'], ...rows]), '']
}

function workerTable(workers: WorkerInfo[]): string[] {
  const head = [
    'WORKER',
    'HOST',
    'DEVICE',
    'MEMORY',
    'STATE',
    'JOB',
    'SHARE',
    'SPEED',
    'HEARD',
    'DOES',
  ]
  return table([head, ...workers.map(workerRow)])
}

const workerRow = (worker: WorkerInfo): string[] => [
  escapeLine(worker.workerId),
  hostOf(worker),
  shorten(escapeLine(worker.device), longestText),
  memoryOf(worker),
  escapeLine(worker.state),
  escapeLine(worker.jobId) || '–',
  worker.share > 0 ? formatPercent(worker.share) : '–',
  worker.tokensPerSecond > 0 ? formatRate(worker.tokensPerSecond) : '–',
  `${formatDuration(worker.silentMs)} ago`,
  doingOf(worker),
]

/** What its job takes of the device, by plan; without a job, what its process takes. */
function memoryOf({ plannedBytes, memoryBytes, deviceMemoryBytes }: WorkerInfo): string {
  const used = plannedBytes || memoryBytes
  return `${used > 0 ? formatBytes(used) : '–'} of ${formatBytes(deviceMemoryBytes)}`
}

function doingOf({ state, doing, step, goneReason }: WorkerInfo): string {
  if (state === 'gone') return shorten(escapeLine(goneReason), longestText)
  if (doing === 'training' && step > 0) return `step ${step}`
  return doing === state ? '' : shorten(escapeLine(doing), longestText)
}

/** Two hosts may have one name; a worker that joined is told apart by its certificate. */
const hostOf = ({ host, hostId }: WorkerInfo): string =>
  escapeLine(hostId === '' ? host : `${host} (${hostId.slice(0, 8)})`)

/** "cuBLASLt: 13.1.0 at /a/long/path" is "cuBLASLt 13.1.0" here. */
const withoutPath = (text: string): string => text.replace(/ at \/\S*.*$/, '').replace(': ', ' ')

function totals(workers: WorkerInfo[]): string {
  const hosts = new Set(workers.map(hostOf)).size
  const speed = workers.reduce((sum, { tokensPerSecond }) => sum + tokensPerSecond, 0)
  const numbers = `${count(workers.length, 'worker')} on ${count(hosts, 'host')}`
  return speed > 0 ? `${numbers}, ${formatRate(speed)} in the last step` : numbers
}

const count = (value: number, what: string) => `${value} ${what}${value === 1 ? '' : 's'}`
