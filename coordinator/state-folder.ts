/**
 * The one folder that holds all state: who may use it, where things lie in it, how others find the
 * coordinator.
 */
import { randomBytes } from 'node:crypto'
import {
  existsSync,
  linkSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'

/** What `endpoint.json` tells a client on the same machine; the file is 0600. */
export interface Endpoint {
  /** host:port of the gRPC server. */
  grpc: string
  token: string
  /** Page of the dashboard without its one-time token; empty: none. */
  dashboard: string
  pid: number
  version: string
  /** No job is run here; a client that has one to run waits until this one ends. */
  isHeld: boolean
  /** Workers that this coordinator starts itself; others may attach. */
  numWorkers: number
}

interface LockOwner {
  pid: number
  /** Start time of the process in clock ticks: tells a process from a later one with its pid. */
  startedAt: string
}

export class StateFolder {
  readonly jetstreamDir: string
  readonly blobsDir: string
  readonly natsDir: string
  readonly logsDir: string
  /** Authority and join tokens, where workers of other hosts may join. */
  readonly tlsDir: string
  readonly tempDir: string
  readonly endpointPath: string
  /** The token alone, for workers: a file, because argv and environments can be read by others. */
  readonly tokenPath: string
  readonly #lockPath: string

  private constructor(readonly path: string) {
    this.jetstreamDir = join(path, 'jetstream')
    this.blobsDir = join(path, 'blobs')
    this.natsDir = join(path, 'nats')
    this.logsDir = join(path, 'logs')
    this.tlsDir = join(path, 'tls')
    this.tempDir = join(path, 'temp')
    this.endpointPath = join(path, 'endpoint.json')
    this.tokenPath = join(path, 'token')
    this.#lockPath = join(path, 'lock')
  }

  /**
   * Takes the folder for this process.
   * @throws TunemeshError STATE_IN_USE while another live process holds it
   */
  static open(path: string): StateFolder {
    const folder = new StateFolder(path)
    for (const dir of [
      path,
      folder.jetstreamDir,
      folder.blobsDir,
      folder.natsDir,
      folder.logsDir,
    ]) {
      mkdirSync(dir, { recursive: true, mode: 0o700 })
    }
    takeLock(folder.#lockPath, path)
    // What a dead coordinator left half done; nothing here is referenced by anything durable.
    rmSync(folder.tempDir, { recursive: true, force: true })
    mkdirSync(folder.tempDir, { mode: 0o700 })
    return folder
  }

  publishEndpoint(endpoint: Endpoint): void {
    writePrivate(this.endpointPath, `${JSON.stringify(endpoint, null, 2)}\n`)
  }

  /** Ports and secrets of the last run, so that clients and workers find this one again. */
  readRemembered<T>(name: string): T | null {
    const path = join(this.natsDir, name)
    if (!existsSync(path)) return null
    try {
      return JSON.parse(readFileSync(path, 'utf8')) as T
    } catch {
      return null // written by a crash half way: made anew, workers attach again by gRPC
    }
  }

  remember(name: string, value: unknown): void {
    writePrivate(join(this.natsDir, name), JSON.stringify(value))
  }

  close(): void {
    rmSync(this.endpointPath, { force: true })
    const owner = readOwner(this.#lockPath)
    if (owner?.pid === process.pid) rmSync(this.#lockPath, { force: true })
  }
}

/** Replaces a file at once; only its owner can read it. */
export function writePrivate(path: string, text: string): void {
  const temp = `${path}.${randomBytes(6).toString('hex')}`
  writeFileSync(temp, text, { mode: 0o600, flag: 'wx' })
  renameSync(temp, path)
}

function takeLock(lockPath: string, folder: string): void {
  const mine = `${lockPath}.${process.pid}.${randomBytes(4).toString('hex')}`
  const owner: LockOwner = { pid: process.pid, startedAt: startTimeOf(process.pid) ?? '' }
  writeFileSync(mine, JSON.stringify(owner), { mode: 0o600 })
  try {
    // link() fails where the name exists, so exactly one process gets it; each failed turn removes
    // a dead lock.
    for (let turn = 0; turn < 5; turn++) {
      if (tryLink(mine, lockPath)) return
      const holder = readOwner(lockPath)
      if (holder !== null && isAlive(holder)) throw inUse(folder, holder)
      moveDeadLockAway(lockPath, `${mine}.dead`)
    }
    throw inUse(folder, readOwner(lockPath))
  } finally {
    rmSync(mine, { force: true })
  }
}

function tryLink(from: string, to: string): boolean {
  try {
    linkSync(from, to)
    return true
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false
    throw error
  }
}

/**
 * Two may find the same dead lock; the slower one would move the quicker one's new lock, so it
 * looks and puts it back.
 */
function moveDeadLockAway(lockPath: string, away: string): void {
  try {
    renameSync(lockPath, away)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return
    throw error
  }
  const moved = readOwner(away)
  if (moved !== null && isAlive(moved)) tryLink(away, lockPath)
  unlinkSync(away)
}

function readOwner(lockPath: string): LockOwner | null {
  try {
    return JSON.parse(readFileSync(lockPath, 'utf8')) as LockOwner
  } catch {
    return null
  }
}

function isAlive(owner: LockOwner): boolean {
  try {
    process.kill(owner.pid, 0)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ESRCH') return false
  }
  const startedAt = startTimeOf(owner.pid)
  return startedAt === null || owner.startedAt === '' || startedAt === owner.startedAt
}

/** Field 22 of /proc/PID/stat; null where there is no such file. */
function startTimeOf(pid: number): string | null {
  const path = `/proc/${pid}/stat`
  try {
    if (!statSync(path).isFile()) return null
    const text = readFileSync(path, 'utf8')
    // The second field is the program's name in parentheses and may hold anything.
    return text.slice(text.lastIndexOf(')') + 2).split(' ')[19] ?? null
  } catch {
    return null
  }
}

const inUse = (folder: string, owner: LockOwner | null) =>
  new TunemeshError(
    'STATE_IN_USE',
    `The state folder ${folder} is in use by process ${owner?.pid ?? 'unknown'}. ` +
      'Talk to that coordinator, stop it, or set TUNEMESH_HOME to another folder.',
  )
