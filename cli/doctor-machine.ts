/**
 * Checks of what surrounds the program: node, the state folder, disk, ports, a running coordinator.
 */
import { mkdir, rm, statfs, writeFile } from 'node:fs/promises'
import { createServer } from 'node:net'
import { join } from 'node:path'
import { liveEndpoint } from '../client/endpoint.js'
import { defaultPorts } from './default-ports.js'
import type { Finding } from './doctor.js'
import { formatBytes } from './format.js'

const minNodeMajor = 20
const littleDiskBytes = 2 * 2 ** 30

export function checkNode(version: string): Finding {
  const name = 'node'
  const isNew = Number(version.split('.')[0]) >= minNodeMajor
  const place = `${process.platform} ${process.arch}`
  if (!isNew) {
    const seen = `${version} (${place}), needs at least ${minNodeMajor}`
    return { name, verdict: 'bad', seen, advice: `Install node ${minNodeMajor} or newer.` }
  }
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    const advice = 'Linux x64 is what is tested; here the engine must be built from source.'
    return { name, verdict: 'warn', seen: `${version} (${place})`, advice }
  }
  return { name, verdict: 'good', seen: `${version} (${place})`, advice: '' }
}

/** The disk is asked about the folder, so the folder comes first. */
export async function checkStateDirAndDisk(stateDir: string): Promise<Finding[]> {
  const folder = await checkStateDir(stateDir)
  return folder.verdict === 'bad' ? [folder] : [folder, await checkDisk(stateDir)]
}

async function checkStateDir(stateDir: string): Promise<Finding> {
  const name = 'state folder'
  const probe = join(stateDir, `.doctor.${process.pid}`)
  try {
    await mkdir(stateDir, { recursive: true, mode: 0o700 })
    await writeFile(probe, '', { flag: 'wx', mode: 0o600 })
    await rm(probe)
    return { name, verdict: 'good', seen: `${stateDir} is writable`, advice: '' }
  } catch (error) {
    const advice = 'Give a folder of yours: --state-dir PATH or TUNEMESH_HOME=PATH.'
    return { name, verdict: 'bad', seen: (error as Error).message, advice }
  }
}

async function checkDisk(stateDir: string): Promise<Finding> {
  const name = 'disk'
  const { bavail, bsize } = await statfs(stateDir)
  const free = bavail * bsize
  const seen = `${formatBytes(free)} free for ${stateDir}`
  return free < littleDiskBytes
    ? { name, verdict: 'warn', seen, advice: 'Checkpoints need room: free some, or move it.' }
    : { name, verdict: 'good', seen, advice: '' }
}

export async function checkCoordinator(stateDir: string): Promise<Finding> {
  const live = await liveEndpoint(stateDir)
  const seen = live
    ? `runs at ${live.grpc} (process ${live.pid})`
    : 'none runs here; verbs start one of their own'
  return { name: 'coordinator', verdict: 'good', seen, advice: '' }
}

/** The fixed ports of `up`; everything else takes free ones. */
export async function checkPorts(stateDir: string): Promise<Finding> {
  const name = 'ports'
  const ports = Object.values(defaultPorts)
  const free = await Promise.all(ports.map(isFree))
  const taken = ports.filter((_, i) => !free[i])
  if (taken.length === 0) {
    return { name, verdict: 'good', seen: `${ports.join(' and ')} are free for \`up\``, advice: '' }
  }
  const seen = `${taken.join(' and ')} taken`
  if (await liveEndpoint(stateDir)) {
    return { name, verdict: 'good', seen: `${seen}, a coordinator runs here`, advice: '' }
  }
  const advice = 'Only `up` is concerned: give it --grpc-port and --dashboard-port.'
  return { name, verdict: 'warn', seen, advice }
}

function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer()
    server.once('error', () => resolve(false))
    server.listen(port, '127.0.0.1', () => server.close(() => resolve(true)))
  })
}
