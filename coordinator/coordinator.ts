/**
 * The coordinator: decides, never touches a tensor. This file is its main path.
 *
 *   state folder → nats-server → logs and stores → fleet → job queue → gRPC and page
 *   → local workers
 *
 * A job goes Submit → ingest (job-queue.ts) → plan and run (job-run.ts, run-machine.ts) → delivery.
 */
import { availableParallelism } from 'node:os'
import type { Logger } from 'pino'
import type { TunemeshError } from '../proto/errors.js'
import { version } from '../proto/version.js'
import {
  BrowserAccess,
  newSecret,
  remoteInterceptor,
  tokenInterceptor,
  WorkerProofs,
} from './access.js'
import { BlobCollector } from './blob-collector.js'
import { blobHandlers } from './blob-service.js'
import { BlobStore } from './blob-store.js'
import { CheckpointStore } from './checkpoint-store.js'
import { CommitLog } from './commit-log.js'
import { EventLog } from './event-log.js'
import { Fleet } from './fleet.js'
import { generateText } from './generate.js'
import { GrpcServer } from './grpc-server.js'
import { HttpServer } from './http-server.js'
import { ingestJob, planRequest } from './job-ingest.js'
import { assertCanBegin, placeOfPrecision } from './job-precision.js'
import { JobQueue } from './job-queue.js'
import { startRun } from './job-run.js'
import { jobHandlers } from './job-service.js'
import { hasEnded, JobStore } from './job-store.js'
import { joinHandlers } from './join-service.js'
import { hostRevoked } from './joined-hosts.js'
import { assertOwnAddress, type ListenAddress } from './listen-address.js'
import { LocalWorkers, threadsEach } from './local-workers.js'
import { findNatsServer } from './nats-binary.js'
import { NatsConnection } from './nats-connection.js'
import { isFree, NatsServer } from './nats-server.js'
import { type JoinLine, RemoteAccess } from './remote-access.js'
import { RpcHandlers } from './rpc-handlers.js'
import { StateFolder, writePrivate } from './state-folder.js'
import type { Tuning } from './tuning.js'
import { workerHandlers } from './worker-service.js'

const connectTimeoutMs = 20_000
const maxWorkers = 256
export interface CoordinatorOptions {
  stateDir: string
  /** Path of nats-server; empty: searched in `path`, the sbin folders and `natsCacheDir`. */
  natsServer: string
  path: string
  natsCacheDir: string
  /** 0: any free port, the last run's where it is free. */
  grpcPort: number
  /** Where workers of other hosts may join, by TLS; null: nowhere. */
  listen: ListenAddress | null
  /** How long the join line told at the start counts. */
  joinTokenTtlMs: number
  /** null: no dashboard. */
  dashboardPort: number | null
  /** Built pages of the dashboard. */
  dashboardDir: string
  numWorkers: number
  /** 0: the processors are divided among the workers. */
  threadsPerWorker: number
  device: string
  workerEnv: NodeJS.ProcessEnv
  /** Nothing queued is run: the folder is only looked at. */
  isHeld: boolean
  tuning: Tuning
  log: Logger
}

/** What everything below the servers shares. */
export interface Mesh {
  options: CoordinatorOptions
  /** Unique to this run of the coordinator. */
  coordinatorId: string
  log: Logger
  folder: StateFolder
  blobs: BlobStore
  checkpoints: CheckpointStore
  commitLog: CommitLog
  events: EventLog
  store: JobStore
  fleet: Fleet
  /** Wall clock, for people; never for deadlines. */
  wallMs: () => number
  /** Monotonic, for deadlines. */
  nowMs: () => number
}

export interface Coordinator {
  grpc: string
  token: string
  /** With a one-time ticket; empty: no dashboard. */
  dashboard: string
  /** null: on loopback only. */
  join: JoinLine | null
  /** Resolves with the reason when this coordinator can not go on. */
  lost: Promise<TunemeshError>
  /** Checkpoints and stops what runs, ends all children, leaves the folder. */
  stop(): Promise<void>
}

export async function startCoordinator(options: CoordinatorOptions): Promise<Coordinator> {
  // What was opened is closed in reverse order, at the end or when a later part fails to start.
  const closers: (() => unknown)[] = []
  const stop = () => closeAll(closers, options.log)
  try {
    return await assemble(options, closers, stop)
  } catch (error) {
    await stop()
    throw error
  }
}

/** What fails to close is told; the others are closed all the same. */
async function closeAll(closers: (() => unknown)[], log: Logger): Promise<void> {
  for (const close of closers.splice(0).reverse()) {
    try {
      await close()
    } catch (error) {
      log.error({ err: error }, 'a part of the coordinator did not close')
    }
  }
}

async function assemble(
  options: CoordinatorOptions,
  closers: (() => unknown)[],
  stop: () => Promise<void>,
): Promise<Coordinator> {
  const { log, tuning } = options
  let lose: (error: TunemeshError) => void = () => {}
  const lost = new Promise<TunemeshError>((resolve) => {
    lose = resolve
  })

  const folder = StateFolder.open(options.stateDir)
  closers.push(() => folder.close())

  const remote = await openRemote(options, folder)
  const nats = await startNats(options, folder, remote)
  closers.push(() => nats.stop())
  nats.on('lost', lose)

  const connection = await NatsConnection.open(nats.coordinatorAddress, connectTimeoutMs)
  closers.push(() => connection.close())

  const mesh = await openMesh({ options, folder, connection, lose })
  const fleetTimer = setInterval(() => {
    mesh.fleet.tick()
    if (mesh.store.list().every(hasEnded)) mesh.fleet.dismissDraining()
  }, tuning.heartbeatMs)
  closers.push(() => clearInterval(fleetTimer))

  const collector = new BlobCollector(mesh)
  const queue: JobQueue = new JobQueue({
    store: mesh.store,
    events: mesh.events,
    blobs: mesh.blobs,
    ingest: (job, signal) => ingestJob(mesh, job, signal),
    admit: (spec, places) => assertCanBegin(mesh, spec, placeOfPrecision(spec, places)),
    run: (job, told) => {
      const running = startRun({ mesh, connection, job, told, lose, queue })
      void running.outcome.catch(() => {}).then(() => collector.collect())
      return running
    },
    isHeld: options.isHeld,
    nowMs: mesh.wallMs,
    log,
  })

  const token = folder.readRemembered<string>('token.json') ?? newSecret()
  folder.remember('token.json', token)
  writePrivate(folder.tokenPath, `${token}\n`)
  const grpc = await listenGrpc({ mesh, nats, queue, token, remote })
  closers.push(() => Promise.all(grpc.servers.map((server) => server.close(1_000))))
  closers.push(() => mesh.events.close())

  const http = await listenHttp(mesh, token)
  closers.push(() => http?.close())

  const workers = localWorkers(mesh, grpc.address)
  closers.push(() => workers.close())
  closers.push(() => queue.close(tuning.endGraceMs))

  const dashboard = http?.url ?? ''
  const { pid } = process
  const { isHeld, numWorkers } = options
  folder.publishEndpoint({ grpc: grpc.address, token, dashboard, pid, version, isHeld, numWorkers })
  workers.start()
  await queue.recover()
  void collector.collect()
  const join = remote?.newToken({ ttlMs: options.joinTokenTtlMs, uses: 1 }) ?? null
  return { grpc: grpc.address, token, dashboard: http?.newTicketUrl() ?? '', join, lost, stop }
}

async function openRemote(
  options: CoordinatorOptions,
  folder: StateFolder,
): Promise<RemoteAccess | null> {
  if (options.listen === null) return null
  await assertOwnAddress(options.listen.host)
  return new RemoteAccess({
    folder: folder.tlsDir,
    listen: options.listen,
    certificateLifeMs: options.tuning.certificateLifeMs,
    nowMs: () => Date.now(),
  })
}

async function startNats(
  options: CoordinatorOptions,
  folder: StateFolder,
  remote: RemoteAccess | null,
): Promise<NatsServer> {
  const { natsServer, path, natsCacheDir, log } = options
  const found = await findNatsServer({ explicit: natsServer, path, cacheDir: natsCacheDir })
  const tls = remote?.natsTls ?? null
  const revokedSeeds = () => remote?.hosts.revoked.map(({ userSeed }) => userSeed) ?? []
  const server = await NatsServer.start({ binary: found.path, folder, log, tls, revokedSeeds })
  log.info({ version: found.version, path: found.path, url: server.url }, 'nats-server is up')
  return server
}

async function openMesh(parts: {
  options: CoordinatorOptions
  folder: StateFolder
  connection: NatsConnection
  lose: (error: TunemeshError) => void
}): Promise<Mesh> {
  const { options, folder, connection, lose } = parts
  const { log, tuning } = options
  const wallMs = () => Date.now()
  const nowMs = () => performance.now()
  const blobs = await BlobStore.open(folder.blobsDir)
  return {
    options,
    coordinatorId: newSecret().slice(0, 16),
    log,
    folder,
    blobs,
    checkpoints: new CheckpointStore(blobs),
    commitLog: await CommitLog.open(connection),
    events: await EventLog.open(connection, { log, nowMs: wallMs, onFenced: lose }),
    store: await JobStore.open(connection),
    fleet: new Fleet({ deadAfterMs: tuning.deadAfterMs, nowMs, maxWorkers }),
    wallMs,
    nowMs,
  }
}

async function listenGrpc(parts: {
  mesh: Mesh
  nats: NatsServer
  queue: JobQueue
  token: string
  remote: RemoteAccess | null
}): Promise<{ servers: GrpcServer[]; address: string }> {
  const { mesh, nats, queue, token, remote } = parts
  const { options, folder, log, fleet, blobs, store, events } = mesh
  const { heartbeatMs, helloTimeoutMs } = options.tuning
  const rpc = new RpcHandlers(log)
  const proofs = new WorkerProofs(token)
  const services = {
    jobs: jobHandlers({
      store,
      queue,
      events,
      fleet,
      rpc,
      plan: (request) => planRequest(mesh, request),
      generate: (request, signal) => generateText(mesh, request, signal),
    }),
    workers: workerHandlers({
      fleet,
      proofs,
      nats,
      userSeedOf: (host) => remote?.hosts.note(host).userSeed ?? '',
      heartbeatMs,
      helloTimeoutMs,
      log,
    }),
    blobs: blobHandlers(blobs, rpc),
    joins: joinHandlers({ remote, rpc, putOut: putOut({ remote, fleet, nats }), log }),
  }
  const host = '127.0.0.1'
  const here = new GrpcServer(tokenInterceptor(token), services)
  const wanted = await portFor(folder, 'grpc-port.json', options.grpcPort)
  const port = await here.listen({ host, port: wanted })
  folder.remember('grpc-port.json', port)
  const address = `${host}:${port}`
  if (remote === null) return { servers: [here], address }
  const { hosts, calls } = remote
  const gate = { isRevoked: (hostId: string) => hosts.isRevoked(hostId), calls }
  const server = new GrpcServer(remoteInterceptor(token, gate), services)
  await listenRemote({ server, folder, remote })
  return { servers: [here, server], address }
}

/** A host was revoked: its calls hear why, its workers are gone, the bus takes them no more. */
const putOut =
  (parts: { remote: RemoteAccess | null; fleet: Fleet; nats: NatsServer }) =>
  async (hostId: string): Promise<number> => {
    const { remote, fleet, nats } = parts
    const workers = fleet.workers.filter((worker) => worker.hostId === hostId)
    remote?.calls.end(hostId, hostRevoked(hostId))
    for (const { id } of workers) fleet.disconnect(id, 'its host was revoked')
    await nats.applyRevocations()
    return workers.length
  }

async function listenRemote(parts: {
  server: GrpcServer
  folder: StateFolder
  remote: RemoteAccess
}): Promise<void> {
  const { server, folder, remote } = parts
  const { host, port: asked } = remote.options.listen
  const port = await portFor(folder, 'tls-port.json', asked, host)
  remote.boundPort = await server.listen({ host, port }, remote.serverCredentials())
  folder.remember('tls-port.json', remote.boundPort)
}

async function listenHttp(mesh: Mesh, token: string): Promise<HttpServer | null> {
  const { options, folder, store, events, fleet, log, wallMs } = mesh
  if (options.dashboardPort === null) return null
  const port = await portFor(folder, 'http-port.json', options.dashboardPort)
  const http = await HttpServer.listen({
    port,
    pagesDir: options.dashboardDir,
    access: new BrowserAccess(token, wallMs),
    feed: { store, events, fleet, nowMs: wallMs },
    log,
  })
  folder.remember('http-port.json', http.port)
  return http
}

/** The port asked for; else the last run's, so that workers and pages find this one again. */
async function portFor(
  folder: StateFolder,
  name: string,
  asked: number,
  host = '127.0.0.1',
): Promise<number> {
  if (asked !== 0) return asked
  const last = folder.readRemembered<number>(name)
  return last !== null && (await isFree(last, host)) ? last : 0
}

function localWorkers(mesh: Mesh, coordinator: string): LocalWorkers {
  const { options, folder, fleet, log } = mesh
  const workers = new LocalWorkers({
    count: options.numWorkers,
    threadsPerWorker:
      options.threadsPerWorker || threadsEach(options.numWorkers, availableParallelism()),
    device: options.device,
    coordinator,
    tokenPath: folder.tokenPath,
    workDir: folder.tempDir,
    env: options.workerEnv,
    tuning: options.tuning.workers,
    firstRestartMs: options.tuning.firstRestartMs,
    log,
    onExhausted: (error) => fleet.exhaust(error),
  })
  fleet.on('counted', ({ hello, hostId }) => {
    if (hostId === '') workers.progressed(hello.processId)
  })
  fleet.on('wanted', () => workers.startAgain())
  return workers
}
