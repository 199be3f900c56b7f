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
import {
  accountName,
  coordinatorUser,
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

export interface NatsServerOptions {
  binary: string
  folder: StateFolder
  log: Logger
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
      const port = await portFor(turn === 0 ? remembered?.port : undefined)
      const server = await NatsServer.#prepared(options, { port, seeds })
      try {
        await server.#launch()
        await server.#assertSynchronous()
        return server
      } catch (error) {
        await server.stop()
        // Another program may have taken the port between the probe and the start.
        if (turn >= 2 || !server.#logTail().includes('address already in use')) throw error
      }
    }
  }

  /** Its secrets are remembered before the server stores anything under the account's name. */
  static async #prepared(options: NatsServerOptions, secrets: Secrets): Promise<NatsServer> {
    const { folder } = options
    const { port, seeds } = secrets
    folder.remember('secrets.json', secrets)
    writePrivate(configPathIn(folder), configText(folder, port, await trustConfig(seeds)))
    const [coordinator, system] = await Promise.all([coordinatorUser(seeds), systemUser(seeds)])
    return new NatsServer(options, secrets, { coordinator, system })
  }

  get url(): string {
    return `nats://127.0.0.1:${this.secrets.port}`
  }

  get coordinatorAddress(): NatsAddress {
    return { url: this.url, user: 'coordinator', credentials: this.users.coordinator }
  }

  get systemAddress(): NatsAddress {
    return { url: this.url, user: 'system', credentials: this.users.system }
  }

  /** For one worker, until `expiresMs` of the wall clock. */
  async workerAddress(workerId: string, expiresMs: number): Promise<NatsAddress> {
    const credentials = await workerUser(this.secrets.seeds, workerId, expiresMs)
    return { url: this.url, user: workerId, credentials }
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

async function portFor(remembered: number | undefined): Promise<number> {
  return remembered !== undefined && (await isFree(remembered)) ? remembered : freePort()
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

function configText(folder: StateFolder, port: number, trust: string): string {
  const text = JSON.stringify
  return `server_name: tunemesh
host: "127.0.0.1"
port: ${port}
max_payload: ${1 << 20}
max_pending: ${64 << 20}
write_deadline: "30s"
log_file: ${text(join(folder.natsDir, 'nats-server.log'))}
logfile_size_limit: ${4 << 20}
jetstream { store_dir: ${text(folder.jetstreamDir)}, sync_interval: always }
${trust}`
}

async function freePort(): Promise<number> {
  const probe = createServer()
  probe.listen(0, '127.0.0.1')
  await once(probe, 'listening')
  const address = probe.address()
  probe.close()
  await once(probe, 'close')
  return typeof address === 'object' && address !== null ? address.port : 0
}

export async function isFree(port: number): Promise<boolean> {
  const probe = createServer()
  const listening = once(probe, 'listening')
  probe.listen(port, '127.0.0.1')
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
