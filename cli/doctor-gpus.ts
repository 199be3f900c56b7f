/** The GPUs that workers of this machine can use, or why there is none. */
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { nodeArgs } from '../client/embedded.js'
import type { Finding } from './doctor.js'
import { formatBytes } from './format.js'

interface GpuReport {
  plugin: string
  gpus: { device: string; description: string; memoryBytes: number }[]
  problem: string
}

const name = 'gpu'
const onCpu = 'Workers compute on the CPU.'

/** Asked of a worker program: the plugin and the driver's libraries are loaded there, not here. */
export async function checkGpus(): Promise<Finding[]> {
  try {
    const args = nodeArgs('worker', ['--list-gpus'])
    const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: 60_000 })
    return findingsOf(JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as GpuReport)
  } catch (error) {
    const why = (error as Error).message.split('\n').slice(0, 2).join(' ')
    return [{ name, verdict: 'warn', seen: `GPUs could not be listed: ${why}`, advice: '' }]
  }
}

export function findingsOf({ plugin, gpus, problem }: GpuReport): Finding[] {
  if (plugin === '') {
    const seen = `the GPU plugin is not built. ${onCpu}`
    const advice = 'For NVIDIA GPUs (docs/cuda.md): node scripts/build.mjs cuda'
    return [{ name, verdict: 'good', seen, advice }]
  }
  const findings: Finding[] = gpus.map(({ device, description, memoryBytes }) => {
    const seen = `${device}: ${description}, ${formatBytes(memoryBytes)}`
    return { name, verdict: 'good', seen, advice: '' }
  })
  if (problem === '') return findings
  const advice =
    gpus.length === 0
      ? `${onCpu} If this machine has an NVIDIA GPU: docs/cuda.md says what it needs.`
      : 'Choose another one for `--device`, or mend this: docs/cuda.md says what it needs.'
  return [...findings, { name, verdict: 'warn', seen: problem, advice }]
}
