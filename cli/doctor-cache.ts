/** What this machine keeps of models, so that they are not packed or fetched again. */
import { readdir, stat } from 'node:fs/promises'
import { homedir } from 'node:os'
import { join } from 'node:path'
import type { Finding } from './doctor.js'
import { formatBytes } from './format.js'

export async function checkCache(env: NodeJS.ProcessEnv): Promise<Finding> {
  const folder = join(env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')
  const [packed, fetched] = await Promise.all([
    bytesIn(join(folder, 'packed')),
    bytesIn(join(folder, 'models')),
  ])
  const limit = env.TUNEMESH_CACHE_GIB
  const bound = limit ? `at most ${limit} GiB each` : 'at most 64 GiB, and 3/4 of the disk'
  const sizes = `${formatBytes(packed)} of packed and ${formatBytes(fetched)} of fetched models`
  return {
    name: 'cache',
    verdict: 'good',
    seen: `${folder}: ${sizes} (${bound}; TUNEMESH_CACHE_GIB)`,
    advice: '',
  }
}

/** Of a folder and those in it; links are not followed, what goes meanwhile counts nothing. */
async function bytesIn(folder: string): Promise<number> {
  const entries = await readdir(folder, { withFileTypes: true }).catch(() => [])
  const sizes = await Promise.all(
    entries.map(async (entry) => {
      const path = join(folder, entry.name)
      if (entry.isDirectory()) return bytesIn(path)
      if (!entry.isFile()) return 0
      return stat(path).then(
        ({ size }) => size,
        () => 0,
      )
    }),
  )
  return sizes.reduce((sum, size) => sum + size, 0)
}
