// Where the tools of a build are: on the machine, or in the project's own cache, which this file
// fills.
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, renameSync, rmSync } from 'node:fs'
import { homedir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export const top = fileURLToPath(new URL('..', import.meta.url))
export const cacheDir = join(process.env.XDG_CACHE_HOME || join(homedir(), '.cache'), 'tunemesh')

/**
 * A mistake of the machine's set-up: one line that names what is missing and the command that gets
 * it.
 */
export class SetupError extends Error {}

/** Runs `main`; a SetupError ends the process with its one line. */
export async function runTool(main) {
  try {
    await main()
  } catch (error) {
    if (!(error instanceof SetupError)) throw error
    console.error(error.message)
    process.exit(2)
  }
}

export const firstLine = (command, args) => {
  const done = spawnSync(command, args, { encoding: 'utf8' })
  return done.status === 0 ? (done.stdout || done.stderr).split('\n')[0] : null
}

/** The program speaks for itself; where it fails, one line more says which it was. */
export function run(command, args, options = {}) {
  const done = spawnSync(command, args, { cwd: top, stdio: 'inherit', ...options })
  if (done.status === 0) return
  const how = done.error?.message ?? `status ${done.status ?? done.signal}`
  throw new SetupError(`${[command, ...args].join(' ')} failed: ${how}`)
}

/** Answers what a program printed; its failure is one line, the last that it said. */
export function execute(command, args, options) {
  try {
    return execFileSync(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] })
  } catch (error) {
    if (error.code === 'ENOENT') throw new Error(`${command} is not on this machine`)
    throw new Error(
      String(error.stderr || error.message)
        .trim()
        .split('\n')
        .at(-1),
    )
  }
}

export function needCompiler() {
  const compiler = process.env.CXX || 'c++'
  if (firstLine(compiler, ['--version']) === null)
    throw new SetupError(
      `BUILD_TOOL_MISSING C++ compiler "${compiler}" not found. Install one: ` +
        'apt-get install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora).',
    )
}

/**
 * CMake of the machine, else PyPI's wheel of it in the cache (the wheel holds the program itself).
 */
export function findCmake() {
  if (firstLine('cmake', ['--version'])) return 'cmake'
  const version = '3.31.6'
  const dir = join(cacheDir, 'cmake', version)
  const program = join(dir, 'cmake', 'data', 'bin', 'cmake')
  if (!existsSync(program)) {
    console.log(`cmake is not on PATH: fetching the wheel cmake ${version} with pip into the cache`)
    pipInstall(dir, [`cmake==${version}`], 'cmake', 'apt-get install cmake')
  }
  return program
}

/** Installs Python packages into a folder of their own, all or nothing. */
export function pipInstall(dir, packages, what, otherwise) {
  mkdirSync(dirname(dir), { recursive: true })
  const temporary = mkdtempSync(`${dir}.`)
  const done = spawnSync(
    'python3',
    [
      '-m',
      'pip',
      'install',
      '--quiet',
      '--disable-pip-version-check',
      '--no-warn-script-location',
      '--root-user-action=ignore',
      '--target',
      temporary,
      ...packages,
    ],
    { stdio: ['ignore', 'inherit', 'inherit'] },
  )
  if (done.status !== 0) {
    rmSync(temporary, { recursive: true, force: true })
    throw new SetupError(
      `BUILD_TOOL_MISSING ${what} not found, and "python3 -m pip install ${packages.join(' ')}" ` +
        `failed. Get it with: ${otherwise}`,
    )
  }
  try {
    renameSync(temporary, dir)
  } catch {
    rmSync(temporary, { recursive: true, force: true }) // another set-up was first
  }
}
