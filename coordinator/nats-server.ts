/**
 * The embedded nats-server: configured closed, asserted synchronous, restarted when it dies.
 * It runs under coordinator/watcher.ts, so that it ends with this process however that ends.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { EventEmitter, once } from 'node:events'
import { existsSync, readdirSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import type { Logger } from 'pino'
import { TunemeshError } from '../proto/errors.js'
import type { NatsAddress, NatsCredentials } from '../proto/nats-client.js'
import { inAddress, type TlsIdentity } from '../proto/tls.js'
import { portTaken } from './grpc-server.js'
import { hereOf } from './listen-address.js'
import {
  accountName,
  coordinatorUser,
  meshAccount,
  type NatsSeeds,
  newSeeds,
  systemUser,
  trustConfig,
  workerUser,
} from './nats-accounts.js'
import { NatsConnection } from './nats-connection.js'
import { scriptCommand } from './script-command.js'
import { type StateFolder, writePrivate } from './state-folder.js'

const startTimeoutMs = 20_000
/** Restarts within `restartWindowMs` after which the server is given up. */
const maxRestarts = 10
const restartWindowMs = 60_000

interface Secrets {
  port: number
  seeds: NatsSeeds
}

/** Where others reach the server, and by which certificates it and this machine's clients speak. */
export interface NatsTls {
  host: string
  /** 0: any free one, the last run's where it is free. */
  port: number
  server: TlsIdentity
  local: TlsIdentity
}

export interface NatsServerOptions {
  binary: string
  folder: StateFolder
  log: Logger
  /** null: plain text on loopback. Else everybody speaks TLS with a certificate of the mesh. */
  tls?: NatsTls | null
  /** Keys of users whose credentials count no more; none where it is absent. */
  revokedSeeds?: () => string[]
}

interface NatsServerEvents {
  /** It died and does not come back: the coordinator must end. */
  lost: [TunemeshError]
}

export class NatsServer extends EventEmitter<NatsServerEvents> {
  #watcher: ChildProcess | null = null
  #serverPid: number | null = null
  #stopping = false
  #restartTimes: number[] = []

  private constructor(
    private readonly options: NatsServerOptions,
    private readonly secrets: Secrets,
    private readonly users: { coordinator: NatsCredentials; system: NatsCredentials },
  ) {
    super()
  }

  /** Starts it and proves that it answers and stores synchronously. */
  static async start(options: NatsServerOptions): Promise<NatsServer> {
    const { folder } = options
    const remembered = folder.readRemembered<Partial<Secrets>>('secrets.json')
    // Null also where an earlier version wrote the file: it knew passwords, not keys.
    const seeds = remembered?.seeds ?? newSeeds()
    takeOverStore(folder, accountName(seeds.mesh))
    for (let turn = 0; ; turn++) {
      const port = await portFor(turn === 0 ? remembered?.port : undefined, options.tls ?? null)
      const server = await NatsServer.#prepared(options, { port, seeds })
      try {
        await server.#launch()
        await server.#assertSynchronous()
        return server
      } catch (error) {
        await server.stop()
        // Another program may have taken the port between the probe and the start.
        if (!server.#logTail().includes('address already in use')) throw error
        if (options.tls?.port) throw portTaken('NATS', options.tls, error)
        if (turn >= 2) throw error
      }
    }
  }

  /** Its secrets are remembered before the server stores anything under the account's name. */
  static async #prepared(options: NatsServerOptions, secrets: Secrets): Promise<NatsServer> {
    const { folder, tls = null } = options
    const { port, seeds } = secrets
    folder.remember('secrets.json', secrets)
    if (tls !== null) writeTlsFiles(folder, tls)
    writePrivate(
      configPathIn(folder),
      configText(folder, { host: tls?.host ?? '127.0.0.1', port }, tls !== null) +
        (await trustConfig(seeds, options.revokedSeeds?.() ?? [])),
    )
    const [coordinator, system] = await Promise.all([coordinatorUser(seeds), systemUser(seeds)])
    return new NatsServer(options, secrets, { coordinator, system })
  }

  get url(): string {
    const { host } = this.options.tls ?? { host: '127.0.0.1' }
    return `nats://${inAddress(hereOf(host))}:${this.secrets.port}`
  }

  get coordinatorAddress(): NatsAddress {
    return this.#addressOf('coordinator', this.users.coordinator)
  }

  get systemAddress(): NatsAddress {
    return this.#addressOf('system', this.users.system)
  }

  /**
   * For one worker, until `expiresMs` of the wall clock.
   * @param userSeed the key of its host; null: a key of its own
   */
  async workerAddress(
    workerId: string,
    expiresMs: number,
    userSeed: string | null = null,
  ): Promise<NatsAddress> {
    const credentials = await workerUser(this.secrets.seeds, workerId, { expiresMs, userSeed })
    return this.#addressOf(workerId, credentials)
  }

  /**
   * Ends the connections of users that are revoked by now, and takes none of theirs any more: at
   * once, and from its configuration after a restart.
   * @throws TunemeshError NATS_UNREACHABLE
   */
  async applyRevocations(): Promise<void> {
    const { seeds } = this.secrets
    const revoked = this.options.revokedSeeds?.() ?? []
    const { folder, tls = null } = this.options
    const address = { host: tls?.host ?? '127.0.0.1', port: this.secrets.port }
    writePrivate(
      configPathIn(folder),
      configText(folder, address, tls !== null) + (await trustConfig(seeds, revoked)),
    )
    const connection = await NatsConnection.open(this.systemAddress, startTimeoutMs)
    try {
      const subject = `$SYS.REQ.ACCOUNT.${accountName(seeds.mesh)}.CLAIMS.UPDATE`
      const claims = new TextEncoder().encode(await meshAccount(seeds, revoked))
      const reply = await connection.request(subject, claims)
      const { data, error } = JSON.parse(new TextDecoder().decode(reply)) as {
        data?: { code?: number }
        error?: { description?: string }
      }
      if (data?.code === 200) return
      const why = error?.description ?? 'no reason given'
      throw new TunemeshError('NATS_UNREACHABLE', `nats-server did not take a revocation: ${why}.`)
    } finally {
      await connection.close()
    }
  }

  #addressOf(user: string, credentials: NatsCredentials): NatsAddress {
    return { url: this.url, user, credentials, tls: this.options.tls?.local ?? null }
  }

  /** Process id of nats-server itself, not of its watcher. */
  get pid(): number | null {
    return this.#serverPid
  }

  async stop(): Promise<void> {
    this.#stopping = true
    const watcher = this.#watcher
    if (watcher === null || watcher.exitCode !== null || watcher.signalCode !== null) return
    const exited = once(watcher, 'exit')
    watcher.stdin?.end()
    await exited
  }

  async #launch(): Promise<void> {
    // The next failure's cause must not be looked for in an earlier run's log.
    rmSync(this.#logPath, { force: true })
    const [node, ...args] = scriptCommand(new URL('watcher', import.meta.url))
    const watcher = spawn(
      node,
      [...args, this.options.binary, '-c', configPathIn(this.options.folder)],
      {
        stdio: ['pipe', 'pipe', 'pipe'],
        // Fewer collections: measured 1.25 times the throughput of 1 MiB messages.
        env: { GOGC: '400' },
        detached: false,
      },
    )
    this.#watcher = watcher
    watcher.stdin.on('error', () => {}) // the pipe of a dead watcher
    watcher.stderr.on('data', (data) => this.options.log.warn(`nats-server: ${data}`.trim()))
    watcher.once('exit', () => this.#onExit(watcher))
    const named = once(createInterface({ input: watcher.stdout }), 'line').then(([line]) => {
      this.#serverPid = Number(line)
    })
    const up = new AbortController()
    const exited = once(watcher, 'exit', { signal: up.signal }).then(() => {
      throw new TunemeshError(
        'NATS_UNREACHABLE',
        `nats-server ended while starting: ${this.#logTail().trim() || 'its log is empty'}.`,
      )
    })
    try {
      const opened = NatsConnection.open(this.systemAddress, startTimeoutMs)
      const connection = await Promise.race([opened, exited])
      await connection.close()
      await Promise.race([named, exited])
    } finally {
      up.abort()
      exited.catch(() => {}) // aborted: nobody waits for it any more
    }
  }

  #onExit(watcher: ChildProcess): void {
    if (this.#stopping || watcher !== this.#watcher) return
    // Where only the watcher was killed, the server still holds the port and the store.
    if (this.#serverPid !== null) killQuietly(this.#serverPid)
    this.#serverPid = null
    void this.#restart()
  }

  async #restart(): Promise<void> {
    const now = performance.now()
    this.#restartTimes = this.#restartTimes.filter((time) => now - time < restartWindowMs)
    this.#restartTimes.push(now)
    const attempt = this.#restartTimes.length
    if (attempt > maxRestarts) {
      const message = `nats-server died ${attempt} times within ${restartWindowMs / 1000} s.`
      this.emit('lost', new TunemeshError('NATS_UNREACHABLE', `${message} See ${this.#logPath}.`))
      return
    }
    this.options.log.warn({ attempt }, 'nats-server died, starting it again')
    await delay(Math.min(50 * 2 ** (attempt - 1), 5_000))
    if (this.#stopping) return
    try {
      await this.#launch()
      this.options.log.info('nats-server is back')
    } catch (error) {
      // Its exit has scheduled the next attempt; only a server that hangs has to be ended here.
      this.options.log.warn({ err: error }, 'nats-server did not come back')
      this.#watcher?.stdin?.end()
    }
  }

  /**
   * A commit that an operating system's crash can lose is none: the setting is read back, not
   * trusted.
   */
  async #assertSynchronous(): Promise<void> {
    const connection = await NatsConnection.open(this.systemAddress, startTimeoutMs)
    try {
      const reply = await connection.request('$SYS.REQ.SERVER.PING.VARZ')
      const varz = JSON.parse(new TextDecoder().decode(reply)) as {
        data?: { jetstream?: { config?: { sync_always?: boolean } } }
      }
      if (varz.data?.jetstream?.config?.sync_always === true) return
    } finally {
      await connection.close()
    }
    throw new TunemeshError(
      'NATS_NOT_SYNCHRONOUS',
      `nats-server at ${this.url} does not report sync_always, so a commit could be lost. ` +
        'Use the version that `npm run setup` installs.',
    )
  }

  get #logPath(): string {
    return join(this.options.folder.natsDir, 'nats-server.log')
  }

  #logTail(): string {
    try {
      return readFileSync(this.#logPath, 'utf8').slice(-2_000)
    } catch {
      return '' // it ended before it could write
    }
  }
}

const configPathIn = (folder: StateFolder) => join(folder.natsDir, 'nats-server.conf')

/** One that was asked for counts whether it is free or not: firewalls know it. */
async function portFor(remembered: number | undefined, tls: NatsTls | null): Promise<number> {
  if (tls !== null && tls.port !== 0) return tls.port
  const host = tls?.host ?? '127.0.0.1'
  const isUsable = remembered !== undefined && (await isFree(remembered, host))
  return isUsable ? remembered : freePort(host)
}

/**
 * The store lies in a folder named by the account: `MESH` where an earlier version wrote it,
 * another key's name where the file of the keys was lost.
 */
function takeOverStore(folder: StateFolder, account: string): void {
  const dir = join(folder.jetstreamDir, 'jetstream')
  const place = join(dir, account)
  if (!existsSync(dir) || existsSync(place)) return
  const names = readdirSync(dir).filter((name) => name === 'MESH' || /^A[A-Z2-7]{55}$/.test(name))
  const [old] = names
  if (old === undefined) return
  if (names.length > 1) {
    throw new TunemeshError(
      'STATE_CONFLICT',
      `${dir} holds the stores of ${names.length} accounts, ${names.join(', ')}, and none is of ` +
        'the key in secrets.json. Move all but the one to keep out of it.',
    )
  }
  renameSync(join(dir, old), place)
}

const tlsPathIn = (folder: StateFolder, name: 'ca' | 'certificate' | 'key') =>
  join(folder.natsDir, `tls-${name}.pem`)

function writeTlsFiles(folder: StateFolder, { server }: NatsTls): void {
  writePrivate(tlsPathIn(folder, 'ca'), server.ca)
  writePrivate(tlsPathIn(folder, 'certificate'), server.certificate)
  writePrivate(tlsPathIn(folder, 'key'), server.key)
}

function configText(
  folder: StateFolder,
  { host, port }: { host: string; port: number },
  isTls: boolean,
): string {
  const text = JSON.stringify
  const path = (name: 'ca' | 'certificate' | 'key') => text(tlsPathIn(folder, name))
  const tls = `tls {
  ca_file: ${path('ca')}, cert_file: ${path('certificate')}, key_file: ${path('key')}
  verify: true, min_version: "1.3", timeout: 5
}
`
  return `server_name: tunemesh
host: ${text(host)}
port: ${port}
max_payload: ${1 << 20}
max_pending: ${64 << 20}
write_deadline: "30s"
ping_interval: "10s"
ping_max: 2
log_file: ${text(join(folder.natsDir, 'nats-server.log'))}
logfile_size_limit: ${4 << 20}
jetstream { store_dir: ${text(folder.jetstreamDir)}, sync_interval: always }
${isTls ? tls : ''}`
}

async function freePort(host: string): Promise<number> {
  const probe = createServer()
  probe.listen(0, host)
  await once(probe, 'listening')
  const address = probe.address()
  probe.close()
  await once(probe, 'close')
  return typeof address === 'object' && address !== null ? address.port : 0
}

export async function isFree(port: number, host = '127.0.0.1'): Promise<boolean> {
  const probe = createServer()
  const listening = once(probe, 'listening')
  probe.listen(port, host)
  try {
    await listening
  } catch {
    return false
  }
  probe.close()
  await once(probe, 'close')
  return true
}

function killQuietly(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // already gone, which is what was wanted
  }
}
