/** `tunemesh doctor`: what this machine has, what it lacks, and the command that mends it. */

import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { checkCache } from './doctor-cache.js'
import { checkCompiler, checkEngine, checkInstructions } from './doctor-engine.js'
import { checkGpus, checkLibraryFolder } from './doctor-gpus.js'
import { checkCoordinator, checkNode, checkPorts, checkStateDirAndDisk } from './doctor-machine.js'
import { checkNats } from './doctor-nats.js'
import { escapeLine } from './escape.js'
import { type InstallOptions, installLibs } from './install-libs.js'
import type { Style } from './style.js'

export interface Finding {
  name: string
  /** `warn` lets training go on; `bad` does not. */
  verdict: 'good' | 'warn' | 'bad'
  /** What was seen. */
  seen: string
  /** What to do; empty where nothing is wrong. */
  advice: string
}

export interface DoctorOptions {
  installLibs?: string
  index?: string
}

export async function doctor(context: Context, options: DoctorOptions): Promise<void> {
  const { output } = context
  if (options.installLibs !== undefined) {
    await installAndCheck(context, { folder: options.installLibs, index: options.index })
    return
  }
  const checks = await Promise.all([
    checkNode(process.versions.node),
    checkEngine(),
    checkInstructions(),
    checkGpus(),
    checkNats(context.natsServerPath, context.env),
    checkCompiler(context.env),
    checkStateDirAndDisk(context.stateDir),
    checkCache(context.env),
    checkCoordinator(context.stateDir),
    checkPorts(context.stateDir),
  ])
  const findings = checks.flat()
  output.record('doctor', { findings })
  for (const finding of findings) output.line(renderFinding(finding, output.style))
  const bad = findings.filter((finding) => finding.verdict === 'bad')
  if (bad.length === 0) return
  const names = bad.map((finding) => finding.name).join(', ')
  throw new TunemeshError(
    bad.some((finding) => finding.name === 'nats-server')
      ? 'NATS_SERVER_MISSING'
      : 'ENGINE_MISSING',
    `Not ready to train: ${names}. Each line above says what to do.`,
  )
}

/** Tells the line that makes workers find the libraries: they inherit the environment. */
async function installAndCheck(context: Context, options: InstallOptions): Promise<void> {
  const { output } = context
  const folder = await installLibs(context, options)
  const findings = await checkLibraryFolder(folder)
  output.record('libraries', { folder, findings })
  for (const finding of findings) output.line(renderFinding(finding, output.style))
  output.line('Workers find them by this line:')
  output.line(`  export TUNEMESH_CUDA_LIBRARY_PATH=${folder}`)
}

const marks = { good: '✓', warn: '!', bad: '✗' } as const

function renderFinding(finding: Finding, style: Style): string {
  const mark = style[finding.verdict](marks[finding.verdict])
  const line = `${mark} ${finding.name.padEnd(14)} ${escapeLine(finding.seen)}`
  return finding.advice === '' ? line : `${line}\n${' '.repeat(17)}${finding.advice}`
}
