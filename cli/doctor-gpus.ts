/** The GPUs that workers of this machine can use, or why there is none. */
import { execFile } from 'node:child_process'
import { promisify } from 'node:util'
import { nodeArgs } from '../client/embedded.js'
import { TunemeshError } from '../proto/errors.js'
import type { Finding } from './doctor.js'
import { formatBytes } from './format.js'

interface GpuReport {
  plugin: string
  gpus: { device: string; description: string; memoryBytes: number; notes: string[] }[]
  /** Driver and libraries; GPU or not. */
  libraries: { name: string; isGood: boolean; text: string }[]
  problem: string
}

const name = 'gpu'
const onCpu = 'Workers compute on the CPU.'

export async function checkGpus(): Promise<Finding[]> {
  try {
    return findingsOf(await askWorker(''))
  } catch (error) {
    const why = (error as Error).message.split('\n').slice(0, 2).join(' ')
    return [{ name, verdict: 'warn', seen: `GPUs could not be listed: ${why}`, advice: '' }]
  }
}

/**
 * Whether the plugin finds and loads what lies in `folder`, GPU or not.
 *
 * @throws ENGINE_MISSING where it takes a library from elsewhere, or none
 */
export async function checkLibraryFolder(folder: string): Promise<Finding[]> {
  const report = await askWorker(folder)
  if (report.plugin === '') return findingsOf(report)
  const findings = libraryFindings(report)
  const isFrom = (text: string) => text.includes(` at ${folder}/`)
  const bad = report.libraries.find(
    (library) => library.name !== 'driver' && !(library.isGood && isFrom(library.text)),
  )
  if (bad === undefined) return findings
  throw new TunemeshError(
    'ENGINE_MISSING',
    `${folder} was filled, but ${bad.name} can not be used from there: ${bad.text}`,
  )
}

/** Asked of a worker program: the plugin and the driver's libraries are loaded there, not here. */
async function askWorker(libraryFolder: string): Promise<GpuReport> {
  const args = nodeArgs('worker', ['--list-gpus', '--library-folder', libraryFolder])
  const { stdout } = await promisify(execFile)(process.execPath, args, { timeout: 60_000 })
  return JSON.parse(stdout.trim().split('\n').at(-1) ?? '') as GpuReport
}

function libraryFindings({ libraries }: GpuReport): Finding[] {
  return libraries.map(({ name, isGood, text }) => ({
    name,
    verdict: isGood ? 'good' : 'warn',
    seen: text,
    advice: '',
  }))
}

const finding = (verdict: Finding['verdict'], seen: string): Finding => ({
  name,
  verdict,
  seen,
  advice: '',
})

/** A machine without a driver is told once that there is no GPU, not what a GPU would need. */
export function findingsOf(report: GpuReport): Finding[] {
  const driver = report.libraries.find((library) => library.name === 'driver')
  const gpus = gpuFindings(report)
  if (driver?.isGood) return [...gpus, ...libraryFindings(report)]
  const isWhole = driver === undefined || report.gpus.length > 0
  // What the driver lacks says more than the device that could not be opened without it.
  return isWhole ? gpus : [{ name, verdict: 'warn', seen: driver.text, advice: onCpu }]
}

function gpuFindings({ plugin, gpus, problem }: GpuReport): Finding[] {
  if (plugin === '') {
    const seen = `the GPU plugin is not built. ${onCpu}`
    const advice = 'For NVIDIA GPUs (docs/cuda.md): node scripts/build.mjs cuda'
    return [{ name, verdict: 'good', seen, advice }]
  }
  const findings: Finding[] = gpus.flatMap(({ device, description, memoryBytes, notes }) => {
    const seen = `${device}: ${description}, ${formatBytes(memoryBytes)}`
    const slower = notes.map((note) => finding('warn', `${device}: ${note}`))
    return [finding('good', seen), ...slower]
  })
  if (problem === '') return findings
  const advice =
    gpus.length === 0
      ? `${onCpu} If this machine has an NVIDIA GPU: docs/cuda.md says what it needs.`
      : 'Choose another one for `--device`, or mend this: docs/cuda.md says what it needs.'
  return [...findings, { name, verdict: 'warn', seen: problem, advice }]
}
