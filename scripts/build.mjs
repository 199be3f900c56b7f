// npm run build: types of the contract, TypeScript, native engine, dashboard; all into build/.
// --product leaves out the C++ tests and benchmarks. The CUDA plugin is built where nvcc is on this
// machine or in the project's cache already; `cuda` by name gets a toolkit first.
// --architectures=90a: machine code for fewer cards, kept until told otherwise, and PTX always.
import { copyFileSync, cpSync, existsSync, mkdirSync, readdirSync, renameSync } from 'node:fs'
import { join } from 'node:path'
import { presentNvcc, setupCuda } from './cuda-setup.mjs'
import { findCmake, needCompiler, run, runTool, top } from './tools.mjs'

const only = process.argv.slice(2).filter((name) => !name.startsWith('--'))
const isProduct = process.argv.includes('--product')
const architectures = process.argv.find((name) => name.startsWith('--architectures='))?.slice(16)
const wants = (part) => only.length === 0 || only.includes(part)

function buildTypescript() {
  run(process.execPath, ['scripts/gen.mjs'])
  for (const name of readdirSync(join(top, 'proto')))
    if (name.endsWith('.proto')) cpSync(join(top, 'proto', name), join(top, 'build/proto', name))
  run(process.execPath, ['node_modules/typescript/bin/tsc', '-p', '.'])
}

function buildNative() {
  needCompiler()
  const cmake = findCmake()
  const dir = 'build/native-cmake'
  if (!existsSync(join(top, dir, 'CMakeCache.txt')))
    run(cmake, ['-S', 'native', '-B', dir, '-DCMAKE_BUILD_TYPE=Release'], {
      stdio: ['ignore', 'ignore', 'inherit'],
    })
  const target = isProduct ? ['--target', 'tunemesh'] : []
  run(cmake, ['--build', dir, '--parallel', '2', ...target])
  mkdirSync(join(top, 'build/native'), { recursive: true })
  // Replaced by rename: a process that has the old addon mapped keeps it whole.
  copyFileSync(join(top, dir, 'tunemesh.node'), join(top, 'build/native/tunemesh.node.new'))
  renameSync(join(top, 'build/native/tunemesh.node.new'), join(top, 'build/native/tunemesh.node'))
}

/** The CUDA plugin, by this nvcc. */
function buildCuda(nvcc) {
  needCompiler()
  const cmake = findCmake()
  const dir = 'build/cuda-cmake'
  const options = ['-DCMAKE_BUILD_TYPE=Release', '-DTUNEMESH_CUDA=ON']
  if (architectures !== undefined) options.push(`-DTUNEMESH_CUDA_ARCHITECTURES=${architectures}`)
  run(cmake, ['-S', 'native', '-B', dir, ...options, `-DTUNEMESH_NVCC=${nvcc}`], {
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  run(cmake, ['--build', dir, '--parallel', '2', '--target', 'tunemesh_cuda'])
  mkdirSync(join(top, 'build/native'), { recursive: true })
  const built = join(top, dir, 'kernels/cuda/tunemesh_cuda.so')
  copyFileSync(built, join(top, 'build/native/tunemesh_cuda.so.new'))
  renameSync(
    join(top, 'build/native/tunemesh_cuda.so.new'),
    join(top, 'build/native/tunemesh_cuda.so'),
  )
}

function buildDashboard() {
  run(process.execPath, [
    'node_modules/vite/bin/vite.js',
    'build',
    '--logLevel',
    'warn',
    '--config',
    'dashboard/vite.config.ts',
    'dashboard',
  ])
}

await runTool(async () => {
  if (wants('ts')) buildTypescript()
  if (wants('native')) buildNative()
  if (wants('dashboard')) buildDashboard()
  const nvcc = only.includes('cuda') ? await setupCuda() : presentNvcc()
  if (nvcc !== null && (only.includes('cuda') || (only.length === 0 && !isProduct))) buildCuda(nvcc)
})
