/** Checks of the native engine: is it built, does it load, what can this processor do. */
import { execFile } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type { Finding } from './doctor.js'

const run = promisify(execFile)

/** The folder of package.json: above cli/, or above build/cli/. */
function projectDir(): string {
  let dir = dirname(fileURLToPath(import.meta.url))
  while (!existsSync(join(dir, 'package.json')) && dirname(dir) !== dir) dir = dirname(dir)
  return dir
}

export async function checkEngine(): Promise<Finding> {
  const name = 'engine'
  const addon = join(projectDir(), 'build', 'native', 'tunemesh.node')
  if (!existsSync(addon)) {
    return { name, verdict: 'bad', seen: `${addon} is missing`, advice: 'Run: npm run build' }
  }
  try {
    // In a process of its own: an addon for another machine may end the process that loads it.
    const script = 'process.dlopen({ exports: {} }, process.argv[1])'
    await run(process.execPath, ['-e', script, addon], { timeout: 20_000 })
    return { name, verdict: 'good', seen: `${addon} loads`, advice: '' }
  } catch (error) {
    const told = (error as { stderr?: string }).stderr ?? (error as Error).message
    const why = told.split('\n').find((line) => line.startsWith('Error:')) ?? told.slice(0, 200)
    return { name, verdict: 'bad', seen: `${addon}: ${why}`, advice: 'Run: npm run build' }
  }
}

const avx512 = ['avx512f', 'avx512bw', 'avx512dq', 'avx512vl']
const avx2 = ['avx2', 'fma', 'f16c', 'bmi2']

export function instructionPathOf(flags: ReadonlySet<string>): 'avx512' | 'avx2' | 'generic' {
  const hasAvx2 = avx2.every((flag) => flags.has(flag))
  if (hasAvx2 && avx512.every((flag) => flags.has(flag))) return 'avx512'
  return hasAvx2 ? 'avx2' : 'generic'
}

export function checkInstructions(): Finding {
  const name = 'processor'
  const path = instructionPathOf(cpuFlags())
  const seen = `${availableParallelism()} threads, ${path} kernels`
  return path === 'generic'
    ? { name, verdict: 'warn', seen, advice: 'No AVX2 here: training works, and is slow.' }
    : { name, verdict: 'good', seen, advice: '' }
}

function cpuFlags(): Set<string> {
  try {
    const line = /^flags\s*:(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))
    return new Set(line?.[1]?.trim().split(/\s+/))
  } catch {
    return new Set() // not Linux: the generic kernels run everywhere
  }
}

/** Only building needs these; a built engine runs without them. */
/** Nothing where there are no sources to build, as in the bundle. */
export async function checkCompiler(env: NodeJS.ProcessEnv): Promise<Finding[]> {
  if (!existsSync(join(projectDir(), 'native/CMakeLists.txt'))) return []
  const name = 'build tools'
  const compilers = env.CXX ? [env.CXX] : ['g++', 'clang++', 'c++']
  const [compiler, cmake] = await Promise.all([firstLine(compilers), firstLine(['cmake'])])
  const seen = [compiler ?? 'no C++ compiler', cmake ?? 'no cmake'].join('; ')
  if (compiler && cmake) return [{ name, verdict: 'good', seen, advice: '' }]
  const missing = [...(compiler ? [] : ['g++']), ...(cmake ? [] : ['cmake'])].join(' ')
  const advice = `Needed to build only. On Debian or Ubuntu: sudo apt-get install ${missing}`
  return [{ name, verdict: 'warn', seen, advice }]
}

async function firstLine(programs: string[]): Promise<string | null> {
  for (const program of programs) {
    try {
      const { stdout } = await run(program, ['--version'], { timeout: 10_000 })
      return stdout.split('\n')[0] ?? program
    } catch {
      // Not there, or it does not run: try the next one.
    }
  }
  return null
}
