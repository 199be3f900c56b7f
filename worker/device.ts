/** The devices of a machine: which one a worker takes, and what it says of it. */
import { existsSync } from 'node:fs'
import { totalmem } from 'node:os'
import { TunemeshError } from '../proto/errors.js'
import type { Precision } from '../proto/train-spec.js'
import { callAddon, nativePlaces } from './addon.js'

type InstructionPath = 'auto' | 'generic' | 'avx2' | 'avx512'

/** How a worker was started; the same for all its jobs. */
export interface DeviceOptions {
  /** "cpu", or "cuda:0" and so on with the plugin beside the addon; by default "cpu". */
  device?: string
  /** CPU; 0: all that the process may use. */
  numThreads: number
  /** CPU. */
  instructionPath: InstructionPath
  /** CPU: folder for packed weights shared by a machine's workers; null: keep them private. */
  packedCacheDir: string | null
  /** Most that this folder holds; by default 64 GiB. The least recently used models go first. */
  packedCacheBytes?: number
  /** Where a GPU's libraries are looked for first. */
  libraryFolder?: string
  /** CPU: why a GPU of this machine is not used, from unusedGpu(); absent or empty: none is. */
  unusedGpu?: string
  /** GPU: parts of a step that repeat are launched as one; by default they are. */
  recordsCalls?: boolean
}

export interface DeviceDescription {
  device: string
  deviceClass: string
  numThreads: number
  memoryBytes: number
  /** What jobs it can compute. */
  precisions: Precision[]
  /**
   * What it runs on: "driver: the driver is for CUDA 13.0", "cuBLASLt: 13.1.0 at …". Of a CPU
   * whose machine has a GPU that can't be used: "gpu: " and why.
   */
  libraries: string[]
}

/** What a worker says of its device before it has any job. */
export function describeDevice(options: DeviceOptions): DeviceDescription {
  const { notes: _, ...described } = openOnce(options, 'fp32')
  return {
    ...described,
    memoryBytes: described.memoryBytes || totalmem(),
    precisions: precisionsOf(described.device),
    libraries: isGpu(options) ? librariesOf(options.libraryFolder ?? '') : leftOut(options),
  }
}

const leftOut = ({ unusedGpu = '' }: DeviceOptions) =>
  unusedGpu === '' ? [] : [`gpu: ${unusedGpu}`]

const isGpu = ({ device }: DeviceOptions) => device?.startsWith('cuda') ?? false

const librariesOf = (libraryFolder: string): string[] =>
  callAddon<GpuReport['libraries']>('findLibraries', 'cuda', findPlugin(), libraryFolder)
    .filter(({ isGood }) => isGood)
    .map(({ name, text }) => `${name}: ${text}`)

/** By a device's description, such as "cuda: NVIDIA H100 (sm_90), cuBLASLt 13.0.2, ...". */
export function precisionsOf(device: string): Precision[] {
  if (!device.startsWith('cuda')) return ['fp32']
  // The plugin refuses cards that lack bfloat16 products.
  const [, major, minor] = /\(sm_90\), cuBLASLt (\d+)\.(\d+)/.exec(device) ?? []
  const hasFp8 = major !== undefined && Number(major) * 100 + Number(minor) >= 1209
  return hasFp8 ? ['fp32', 'bf16', 'fp8'] : ['fp32', 'bf16']
}

interface OpenedDevice extends Omit<DeviceDescription, 'precisions' | 'libraries'> {
  /** What runs slower there than it could, and why. */
  notes: string[]
}

/** A device that cannot be opened at all is one that the user has to mend, or to leave out. */
function openOnce(options: DeviceOptions, precision: Precision): OpenedDevice {
  try {
    return callAddon<OpenedDevice>(
      'describeDevice',
      nativeDevice(options, { precision, deterministic: true }),
    )
  } catch (cause) {
    if (!(cause instanceof TunemeshError) || cause.code !== 'ENGINE_FAILED') throw cause
    const { message, details } = cause
    const device = options.device ?? 'cpu'
    throw new TunemeshError('ENGINE_MISSING', `Device ${device} can not be used: ${message}`, {
      details,
      cause,
    })
  }
}

/**
 * The device that worker `index` of a machine takes: GPUs in turn, or the CPU where there is none.
 * A GPU that can't be used is an error of describeDevice(), not a reason to compute slowly.
 */
export function chooseDevice(wanted: string, index: number): string {
  if (wanted !== 'auto') return wanted
  const pluginPath = findPlugin()
  const count = pluginPath ? callAddon<number>('countDevices', 'cuda', pluginPath) : 0
  return count > 0 ? `cuda:${index % count}` : 'cpu'
}

/** Where Linux tells that NVIDIA's driver is in the kernel: so there is a GPU to compute on. */
const driverInKernel = '/proc/driver/nvidia/version'

/**
 * Why a worker that was to take a GPU computes on the CPU although the machine has one; empty where
 * nobody would expect otherwise.
 */
export function unusedGpu(wanted: string, device: string, driverFile = driverInKernel): string {
  if (wanted !== 'auto' || device !== 'cpu' || !existsSync(driverFile)) return ''
  const { plugin, libraries, problem } = listGpus('')
  if (plugin === '') return 'the GPU plugin is not built'
  const driver = libraries.find(({ name, isGood }) => name === 'driver' && !isGood)
  return driver?.text ?? problem
}

interface GpuReport {
  /** The GPU plugin; empty: it is not built. */
  plugin: string
  gpus: { device: string; description: string; memoryBytes: number; notes: string[] }[]
  /** Driver and libraries, as the plugin finds them; GPU or not. */
  libraries: { name: string; isGood: boolean; text: string }[]
  /** Why none can be used, or why not all; empty: nothing is wrong. */
  problem: string
}

/** Every GPU that the plugin sees, for `tunemesh doctor`; never throws. */
export function listGpus(libraryFolder: string): GpuReport {
  const report: GpuReport = { plugin: findPlugin(), gpus: [], libraries: [], problem: '' }
  if (report.plugin === '') return report
  try {
    report.libraries = callAddon('findLibraries', 'cuda', report.plugin, libraryFolder)
    const count = callAddon<number>('countDevices', 'cuda', report.plugin)
    // The first one is opened in any case: its error says why there is none.
    for (let index = 0; index < Math.max(1, count); index++) {
      const device = `cuda:${index}`
      const options = { device, numThreads: 1, packedCacheDir: null, libraryFolder }
      // As most jobs use it: in bfloat16, with cuDNN where that is found.
      const described = openOnce({ ...options, instructionPath: 'auto' }, 'bf16')
      const { memoryBytes, notes } = described
      report.gpus.push({ device, description: described.device, memoryBytes, notes })
    }
  } catch (error) {
    report.problem = error instanceof Error ? error.message : String(error)
  }
  return report
}

/** What a job wants of its device. */
export interface DeviceArithmetic {
  /** Of activations and matrix products. */
  precision: Precision
  /** Else sums in whatever order is fastest. */
  deterministic: boolean
}

/** The fields of a device as the addon reads them: all present. */
export function nativeDevice(
  options: DeviceOptions,
  { precision, deterministic }: DeviceArithmetic,
): object {
  return {
    device: options.device ?? 'cpu',
    numThreads: options.numThreads,
    instructionPath: options.instructionPath,
    libraryFolder: options.libraryFolder ?? '',
    recordsCalls: options.recordsCalls ?? true,
    precision,
    isDeterministic: deterministic,
    pluginPath: findPlugin(),
  }
}

const findPlugin = () => nativePlaces('tunemesh_cuda.so').find((place) => existsSync(place)) ?? ''
