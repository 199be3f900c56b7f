/** Where nats-server is looked for, in the coordinator's order, and whether one is new enough. */
import { execFile } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { homedir } from 'node:os'
import { delimiter, join } from 'node:path'
import { promisify } from 'node:util'
import type { Finding } from './doctor.js'

const run = promisify(execFile)

/** The floor that the coordinator asserts at start-up. */
const minVersion = [2, 12] as const

export async function checkNats(
  explicit: string | undefined,
  env: NodeJS.ProcessEnv,
): Promise<Finding> {
  const name = 'nats-server'
  const tooOld: string[] = []
  for (const path of explicit ? [explicit] : candidates(env)) {
    const version = await versionOf(path)
    if (version === null) continue
    if (isNewEnough(version))
      return { name, verdict: 'good', seen: `${version} at ${path}`, advice: '' }
    tooOld.push(`${version} at ${path}`)
  }
  const floor = minVersion.join('.')
  const advice = 'Run: npm run setup (or name one: TUNEMESH_NATS_SERVER=/path/to/nats-server)'
  const places = explicit ? `at ${explicit}` : 'on PATH, in the sbin folders or in the cache'
  const seen =
    tooOld.length > 0 ? `needs at least ${floor}: ${tooOld.join(', ')}` : `none found ${places}`
  return { name, verdict: 'bad', seen, advice }
}

export function isNewEnough(version: string): boolean {
  const [major = 0, minor = 0] = version.split('.').map(Number)
  return major > minVersion[0] || (major === minVersion[0] && minor >= minVersion[1])
}

function candidates(env: NodeJS.ProcessEnv): string[] {
  const folders = [...(env.PATH ?? '').split(delimiter), '/usr/local/sbin', '/usr/sbin', '/sbin']
  const found = folders.filter((dir) => dir !== '').map((dir) => join(dir, 'nats-server'))
  return [...new Set([...found, ...cached(env)])]
}

function cached(env: NodeJS.ProcessEnv): string[] {
  const cacheDir = join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh', 'nats-server')
  try {
    return readdirSync(cacheDir)
      .sort((a, b) => b.localeCompare(a, 'en', { numeric: true }))
      .map((version) => join(cacheDir, version, 'nats-server'))
  } catch {
    return [] // never set up
  }
}

async function versionOf(path: string): Promise<string | null> {
  try {
    const { stdout } = await run(path, ['--version'], { timeout: 10_000 })
    return /v?(\d+\.\d+\.\d+\S*)/.exec(stdout)?.[1] ?? null
  } catch {
    return null // not there, or not for this machine
  }
}
