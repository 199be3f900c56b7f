/** WorkerService: one stream a worker. The first message is Hello, its answer Welcome. */
import type * as grpc from '@grpc/grpc-js'
import type { Logger } from 'pino'
import { TunemeshError } from '../proto/errors.js'
import type { FromWorker__Output } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { Hello__Output } from '../proto/gen/tunemesh/v1/Hello.js'
import type { ToWorker } from '../proto/gen/tunemesh/v1/ToWorker.js'
import type { WorkerServiceHandlers } from '../proto/gen/tunemesh/v1/WorkerService.js'
import type { NatsAddress } from '../proto/nats-client.js'
import { rpcStatusOf } from '../proto/rpc-error.js'
import { type WorkerProofs, workerHostOf } from './access.js'
import type { Fleet, FleetWorker } from './fleet.js'
import { workerLifeMs } from './nats-accounts.js'

export interface WorkerServiceOptions {
  fleet: Fleet
  proofs: WorkerProofs
  nats: { workerAddress(id: string, expiresMs: number, seed?: string | null): Promise<NatsAddress> }
  /** The key on the bus of a joined host's workers; it is noted where it was not known. */
  userSeedOf(host: { hostId: string; host: string }): string
  heartbeatMs: number
  /** How long a new stream may take to say Hello. */
  helloTimeoutMs: number
  log: Logger
}

type AttachCall = grpc.ServerDuplexStream<FromWorker__Output, ToWorker>

export function workerHandlers(options: WorkerServiceOptions): WorkerServiceHandlers {
  return { Attach: (call) => attach(call, options) }
}

function attach(call: AttachCall, options: WorkerServiceOptions): void {
  const { fleet, log } = options
  let worker: FleetWorker | null = null
  const refuse = (error: unknown) => {
    const { code, details, metadata } = rpcStatusOf(error)
    call.emit('error', Object.assign(new Error(details), { code, details, metadata }))
  }
  const helloTimer = setTimeout(() => refuse(noHello()), options.helloTimeoutMs)
  let renewal: NodeJS.Timeout | undefined
  const gone = (reason: string) => {
    clearTimeout(helloTimer)
    clearInterval(renewal)
    if (worker !== null) fleet.streamEnded(worker, reason)
    call.end()
  }
  call.on('data', (message: FromWorker__Output) => {
    if (worker !== null) {
      fleet.receive(worker, message)
      return
    }
    clearTimeout(helloTimer)
    try {
      if (!message.hello) throw noHello()
      const { end, send } = streamOf(call)
      const hostId = workerHostOf(call) ?? ''
      worker = fleet.attach(provenHello(message.hello, hostId, options), { send, end }, hostId)
    } catch (error) {
      log.warn({ err: error }, 'a worker was refused')
      refuse(error)
      return
    }
    const welcomed = worker
    renewal = setInterval(() => void renew(welcomed, options), workerLifeMs / 2)
    renewal.unref()
    welcome(worker, options).catch(refuse)
  })
  call.on('end', () => gone('the worker ended its stream'))
  call.on('cancelled', () => gone('its connection broke'))
  call.on('error', (error) => gone(error.message))
}

/** Without the id it had where it can not prove that it had it: it is a new worker then. */
function provenHello(
  hello: Hello__Output,
  hostId: string,
  { proofs, log }: WorkerServiceOptions,
): Hello__Output {
  const { previousWorkerId: id, previousWorkerProof: proof, host } = hello
  if (id === '' || proofs.isProof(proof, id, hostId)) return hello
  log.warn({ id, host, hostId }, 'a worker could not prove that it had this id')
  return { ...hello, previousWorkerId: '' }
}

function streamOf(call: AttachCall) {
  let ended = false
  return {
    send: (message: ToWorker) => {
      if (!ended) call.write(message)
    },
    end: () => {
      ended = true
      call.end()
    },
  }
}

async function welcome(worker: FleetWorker, options: WorkerServiceOptions): Promise<void> {
  const { hello, id, hostId } = worker
  const { url, credentials, tls } = await addressFor(worker, options)
  if (options.fleet.get(id) !== worker) return // it left meanwhile
  worker.stream.send({
    welcome: {
      workerId: id,
      natsUrl: url,
      nats: credentials,
      heartbeatMs: options.heartbeatMs,
      workerProof: options.proofs.proofOf(id, hostId),
      natsTls: hostId === '' ? (tls ?? null) : null,
    },
  })
  const { host, device } = hello
  options.log.info({ workerId: id, host, hostId, device }, 'worker attached')
  options.fleet.announce(worker)
}

/** Throws where the list of hosts is full. */
async function addressFor(
  { id, hello, hostId }: FleetWorker,
  { nats, userSeedOf }: WorkerServiceOptions,
): Promise<NatsAddress> {
  const { host } = hello
  const userSeed = hostId === '' ? null : userSeedOf({ hostId, host })
  return nats.workerAddress(id, Date.now() + workerLifeMs, userSeed)
}

/** Before the credentials of its Welcome expire; the server would end its connection. */
async function renew(worker: FleetWorker, options: WorkerServiceOptions): Promise<void> {
  try {
    const { credentials } = await addressFor(worker, options)
    worker.stream.send({ renewedNats: credentials })
  } catch (error) {
    options.log.error(
      { err: error, workerId: worker.id },
      'its NATS credentials could not be renewed',
    )
  }
}

const noHello = () =>
  new TunemeshError('VERSION_MISMATCH', 'An Attach stream must begin with Hello, and soon.')
