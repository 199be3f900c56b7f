/**
 * Where a nats-server is looked for, and from which version on it will do: the same for the
 * coordinator that starts it and for `tunemesh doctor`. Nothing is downloaded here.
 */
import { execFile } from 'node:child_process'
import { accessSync, constants, readdirSync } from 'node:fs'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'

/** 2.12 has the synchronous store's fixes and batched direct reads that the event log uses. */
const minNatsVersion = [2, 12] as const
export const natsFloor = minNatsVersion.join('.')

export interface NatsSearch {
  /** TUNEMESH_NATS_SERVER or --nats-server; empty: search. */
  explicit: string
  /** Folders of PATH, as the environment has them. */
  path: string
  /** Where `npm run setup` puts it: one folder a version. */
  cacheDir: string
}

export interface NatsBinary {
  path: string
  version: string
}

/** The first one that is new enough, and what older ones were passed over until then. */
export async function searchNatsServer(
  search: NatsSearch,
): Promise<{ found: NatsBinary | null; tooOld: NatsBinary[] }> {
  const tooOld: NatsBinary[] = []
  for (const path of candidates(search)) {
    const version = await versionOf(path)
    if (version === null) continue
    if (isNewEnough(version)) return { found: { path, version }, tooOld }
    tooOld.push({ path, version })
  }
  return { found: null, tooOld }
}

export function isNewEnough(version: string): boolean {
  const [major = 0, minor = 0] = version.split('.').map(Number)
  const [minMajor, minMinor] = minNatsVersion
  return major > minMajor || (major === minMajor && minor >= minMinor)
}

/** An explicit one stands alone: silently taking another would hide the mistake. */
function candidates({ explicit, path, cacheDir }: NatsSearch): string[] {
  if (explicit !== '') return [explicit]
  const folders = [...path.split(delimiter), '/usr/local/sbin', '/usr/sbin', '/sbin']
  const found = folders.filter((dir) => dir !== '').map((dir) => join(dir, 'nats-server'))
  return [...new Set([...found, ...cached(cacheDir)])].filter(isExecutable)
}

/** Newest first. */
function cached(cacheDir: string): string[] {
  try {
    return readdirSync(cacheDir)
      .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
      .map((version) => join(cacheDir, version, 'nats-server'))
  } catch {
    return [] // never set up
  }
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK)
    return true
  } catch {
    return false
  }
}

async function versionOf(path: string): Promise<string | null> {
  try {
    const { stdout } = await promisify(execFile)(path, ['--version'], { timeout: 10_000 })
    return /v?(\d+\.\d+\.\d+\S*)/.exec(stdout)?.[1] ?? null
  } catch {
    return null // not a nats-server, or not for this machine
  }
}
