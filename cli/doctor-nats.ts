/** Whether the coordinator will find a nats-server that is new enough. */
import { homedir } from 'node:os'
import { join } from 'node:path'
import { natsFloor, searchNatsServer } from '../proto/nats-search.js'
import type { Finding } from './doctor.js'

export async function checkNats(
  explicit: string | undefined,
  env: NodeJS.ProcessEnv,
): Promise<Finding> {
  const name = 'nats-server'
  const { found, tooOld } = await searchNatsServer({
    explicit: explicit ?? '',
    path: env.PATH ?? '',
    cacheDir: join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh', 'nats-server'),
  })
  if (found) {
    return { name, verdict: 'good', seen: `${found.version} at ${found.path}`, advice: '' }
  }
  const places = explicit ? `at ${explicit}` : 'on PATH, in the sbin folders or in the cache'
  const older = tooOld.map(({ path, version }) => `${version} at ${path}`).join(', ')
  return {
    name,
    verdict: 'bad',
    seen: older === '' ? `none found ${places}` : `needs at least ${natsFloor}: ${older}`,
    advice: 'Run: npm run setup (or name one: TUNEMESH_NATS_SERVER=/path/to/nats-server)',
  }
}
