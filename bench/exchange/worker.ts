/** A worker process of `bench exchange`: moves a step's gradients when told, then reports. */
import { readFileSync } from 'node:fs'
import { Session } from 'node:inspector/promises'
import { NatsConnection } from '../../worker/nats-connection.js'
import { ExchangeMover, PlainMover, type WorkerSetup } from './movers.js'

export interface StepReport {
  cpuSeconds: number
  bytesSent: number
  bytesReceived: number
  /** Of the profiled step's CPU time: this project's own JavaScript, and the NATS client's. */
  ownShare?: number
  clientShare?: number
}
export type ToChild =
  | { kind: 'step'; step: number; isProfiled: boolean }
  | { kind: 'report' }
  | { kind: 'end' }

async function runWorker(setup: WorkerSetup): Promise<void> {
  const connection = await NatsConnection.open({
    url: setup.url,
    user: 'worker',
    credentials: null,
  })
  const mover =
    setup.codec === 'fp32'
      ? new PlainMover(setup, connection)
      : await ExchangeMover.open(setup, connection)
  const before = { cpu: process.cpuUsage(), bytesSent: 0, bytesReceived: 0 }
  let profile: Pick<StepReport, 'ownShare' | 'clientShare'> = {}
  process.on('message', async (message: ToChild) => {
    if (message.kind === 'step') {
      Object.assign(before, mover.counts, { cpu: process.cpuUsage() })
      if (message.isProfiled) profile = await profiled(() => mover.step(message.step))
      else await mover.step(message.step)
      process.send?.('done')
    } else if (message.kind === 'report') {
      const { user, system } = process.cpuUsage(before.cpu)
      process.send?.({
        cpuSeconds: (user + system) / 1e6,
        bytesSent: mover.counts.bytesSent - before.bytesSent,
        bytesReceived: mover.counts.bytesReceived - before.bytesReceived,
        ...profile,
      } satisfies StepReport)
    } else {
      await mover.close()
      await connection.close()
      process.disconnect()
    }
  })
  // The server knows the subscriptions before anyone publishes.
  await connection.flush()
  process.send?.('ready')
}

/**
 * Self time by origin: its part of the JavaScript thread's samples that are not idle, times that
 * thread's part of the process's CPU time (samples alone count the wall clock, waiting included).
 */
async function profiled(
  run: () => Promise<void>,
): Promise<Pick<StepReport, 'ownShare' | 'clientShare'>> {
  const session = new Session()
  session.connect()
  await session.post('Profiler.enable')
  await session.post('Profiler.start')
  const before = { main: mainThreadSeconds(), all: process.cpuUsage() }
  await run()
  const { user, system } = process.cpuUsage(before.all)
  const mainShare = (mainThreadSeconds() - before.main) / ((user + system) / 1e6)
  const { profile } = await session.post('Profiler.stop')
  session.disconnect()
  const origins = new Map(profile.nodes.map((node) => [node.id, originOf(node.callFrame)] as const))
  const selfUs = { own: 0, client: 0, other: 0, idle: 0 }
  for (const [index, id] of (profile.samples ?? []).entries()) {
    selfUs[origins.get(id) ?? 'other'] += profile.timeDeltas?.[index] ?? 0
  }
  const busyUs = selfUs.own + selfUs.client + selfUs.other
  return {
    ownShare: (mainShare * selfUs.own) / busyUs,
    clientShare: (mainShare * selfUs.client) / busyUs,
  }
}

/** User and system time of the main thread, in hundredths. */
function mainThreadSeconds(): number {
  const stat = readFileSync(`/proc/self/task/${process.pid}/stat`, 'utf8')
  const fields = stat.split(') ')[1]?.split(' ') ?? []
  return (Number(fields[11]) + Number(fields[12])) / 100
}

function originOf({ functionName, url }: { functionName: string; url: string }) {
  if (functionName === '(idle)') return 'idle'
  if (url.includes('/node_modules/nats/')) return 'client'
  return /\/(worker|proto|bench)\//.test(url) && !url.includes('/node_modules/') ? 'own' : 'other'
}

await runWorker(JSON.parse(process.argv[2] ?? '') as WorkerSetup)
