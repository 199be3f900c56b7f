/**
 * Finds the coordinator to talk to: the one that was named, else the live one of the state folder.
 */
import { readFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join, resolve } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { TunemeshClient } from './client.js'

/** What `endpoint.json` in the state folder holds (mode 0600: it carries the token). */
export interface Endpoint {
  /** host:port of the gRPC server. */
  grpc: string
  token: string
  /** URL of the dashboard; empty: none. */
  dashboard: string
  /** 0 where the coordinator was named by its address. */
  pid: number
  /** It runs no jobs: a command that only looks or asks has the state folder. */
  isHeld: boolean
  /** Workers that it starts itself. */
  numWorkers: number
}

/** Where state lies: the folder asked for, TUNEMESH_HOME, or the XDG state folder. */
export function stateDirFor(asked: string | undefined, env: NodeJS.ProcessEnv): string {
  // Absolute: links within it and other processes must not depend on where this one stands.
  if (asked) return resolve(asked)
  if (env.TUNEMESH_HOME) return resolve(env.TUNEMESH_HOME)
  return join(env.XDG_STATE_HOME || join(homedir(), '.local', 'state'), 'tunemesh')
}

/** The coordinator that runs on a state folder, or null: no file, a dead process, or no answer. */
export async function liveEndpoint(stateDir: string): Promise<Endpoint | null> {
  const endpoint = parseEndpoint(await readIfThere(join(stateDir, 'endpoint.json')))
  if (endpoint === null || !isProcessAlive(endpoint.pid)) return null
  return (await answers(endpoint)) ? endpoint : null
}

/** @throws TunemeshError NOT_AUTHENTICATED when no token came with the address */
export function namedEndpoint(server: string, token: string | undefined): Endpoint {
  if (!/^.+:\d+$/.test(server)) {
    throw new TunemeshError(
      'COORDINATOR_UNREACHABLE',
      `--server ${server} has no port. Write HOST:PORT, for example 127.0.0.1:8471.`,
    )
  }
  if (!token) {
    throw new TunemeshError(
      'NOT_AUTHENTICATED',
      `--server ${server} needs a token. Give --token-file PATH or set TUNEMESH_TOKEN.`,
    )
  }
  return { grpc: server, token, dashboard: '', pid: 0, isHeld: false, numWorkers: 0 }
}

export function parseEndpoint(text: string | null): Endpoint | null {
  if (text === null) return null
  try {
    const told = JSON.parse(text) as Record<string, unknown>
    const { grpc, token, pid } = told
    if (typeof grpc !== 'string' || typeof token !== 'string' || typeof pid !== 'number') {
      return null
    }
    const dashboard = typeof told.dashboard === 'string' ? told.dashboard : ''
    const numWorkers = Number(told.numWorkers ?? 0)
    return { grpc, token, dashboard, pid, isHeld: told.isHeld === true, numWorkers }
  } catch {
    return null // half written by a coordinator that died: the same as none
  }
}

async function readIfThere(path: string): Promise<string | null> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null
    throw error
  }
}

export function isProcessAlive(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

async function answers(endpoint: Endpoint): Promise<boolean> {
  const client = new TunemeshClient({ address: endpoint.grpc, token: endpoint.token })
  try {
    await client.probe()
    return true
  } catch {
    // Whatever is wrong with it, it is not a coordinator that we can use.
    return false
  } finally {
    client.close()
  }
}
