/**
 * A copy of the built program whose CUDA plugin is another library: workers of `--device cuda` use
 * that one. Whole jobs in bf16, and what users read of cards and libraries that are not right, are
 * so tested without a card.
 */
import { type SpawnSyncReturns, spawnSync } from 'node:child_process'
import { cpSync, existsSync, mkdirSync, rmSync, symlinkSync } from 'node:fs'
import { join } from 'node:path'
import { projectTop } from '../project-top.js'
import { temporaryFolder } from './open-nats.js'

const built = join(projectTop, 'build')

/** The host in the place of a card (test/native/host_card.cc). */
export const hostCard = join(built, 'native-cmake', 'host_card.so')
/** The plugin itself, where it is built. */
export const cudaPlugin = join(built, 'native', 'tunemesh_cuda.so')

/** Stand-ins for NVIDIA's driver and libraries (test/native/fake_cuda.cc). */
export const fakeLibraries = join(built, 'native-cmake', 'fake-cuda')

/** Why tests of this plugin can not run here, or false. */
export const lacks = (plugin: string): string | false =>
  [plugin, join(built, 'native', 'tunemesh.node')].every(existsSync) ? false : `no ${plugin} here`

export class ProgramCopy {
  readonly folder = temporaryFolder()

  constructor(plugin: string) {
    const parts = ['bench', 'cli', 'client', 'coordinator', 'examples', 'proto', 'test', 'worker']
    for (const part of parts)
      cpSync(join(built, part), join(this.folder, 'build', part), { recursive: true })
    mkdirSync(join(this.folder, 'build', 'native'))
    const native = (file: string) => join(this.folder, 'build', 'native', file)
    symlinkSync(join(built, 'native', 'tunemesh.node'), native('tunemesh.node'))
    symlinkSync(plugin, native('tunemesh_cuda.so'))
    for (const part of ['node_modules', 'package.json', 'examples'])
      symlinkSync(join(projectTop, part), join(this.folder, part))
  }

  /** A built program of the copy, to its end. */
  run(program: string, args: string[], env: NodeJS.ProcessEnv = {}): SpawnSyncReturns<string> {
    return this.node([join(this.folder, 'build', program), ...args], env)
  }

  node(args: string[], env: NodeJS.ProcessEnv): SpawnSyncReturns<string> {
    return spawnSync(process.execPath, args, {
      encoding: 'utf8',
      cwd: this.folder,
      env: { ...process.env, TUNEMESH_HOME: join(this.folder, 'state'), ...env },
      timeout: 240_000,
    })
  }

  remove(): void {
    rmSync(this.folder, { recursive: true, force: true })
  }
}
