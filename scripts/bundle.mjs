// npm run bundle: one archive that runs on a bare linux-x64 machine: Node, the compiled program,
// its packages, the native libraries, nats-server, examples and tests. Prints the archive's path.
import { spawnSync } from 'node:child_process'
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { setupNatsServer } from './nats-setup.mjs'
import { run, runTool, SetupError, top } from './tools.mjs'

/** The archive, a checkout and a peer's wheels must travel together. */
const maxArchiveBytes = 40 * 1024 * 1024
const { version } = JSON.parse(readFileSync(join(top, 'package.json'), 'utf8'))
const name = `tunemesh-${version}-linux-x64`
const outDir = join(top, 'build/bundle')
const root = join(outDir, name)
const app = join(root, 'app')

/** Built files that run; type declarations and source maps stay behind. */
const builtParts = ['cli', 'client', 'coordinator', 'worker', 'proto', 'page', 'native']
const developerParts = ['bench', 'examples', 'test']
const nativePrograms = /(_test|_bench)$/

const launcher = `#!/bin/sh
# Runs tunemesh from this folder, through symbolic links too; nothing is installed.
#   ./tunemesh VERB …            as everywhere
#   ./tunemesh dev golden|bench|bench:gpu|test …   what \`npm run\` and \`npm test\` run
here=$(dirname "$(readlink -f "$0")")
: "\${TUNEMESH_NATS_SERVER:=$here/nats-server}"
export TUNEMESH_NATS_SERVER
if [ "$1" = dev ]; then
  what=$2
  [ $# -ge 2 ] && shift 2
  case $what in
    golden) program=build/test/golden-run/golden.js ;;
    bench) program=build/bench/bench.js ;;
    bench:gpu) program=build/bench/gpu.js ;;
    test) program=scripts/test.mjs ;;
    *) echo "tunemesh dev: golden, bench, bench:gpu or test, not \\"$what\\"." >&2; exit 2 ;;
  esac
  exec "$here/node" "$here/app/$program" "$@"
fi
exec "$here/node" "$here/app/build/cli/main.js" "$@"
`

function needLinuxX64() {
  if (process.platform === 'linux' && process.arch === 'x64') return
  throw new SetupError(
    'BUNDLE_PLATFORM the bundle is built on linux-x64, ' +
      `this is ${process.platform}-${process.arch}.`,
  )
}

/** The commit that `bench:gpu` writes into its records, and the libraries without symbols. */
function finishBuilt() {
  const found = spawnSync('git', ['rev-parse', '--short', 'HEAD'], { cwd: top, encoding: 'utf8' })
  writeFileSync(join(app, 'build/commit.txt'), found.stdout)
  for (const library of ['tunemesh.node', 'tunemesh_cuda.so']) {
    const path = join(app, 'build/native', library)
    if (existsSync(path)) spawnSync('strip', ['--strip-unneeded', path])
  }
}

function copyBuilt() {
  const isWanted = (path) => !/\.(map|d\.ts)$/.test(path)
  for (const part of [...builtParts, ...developerParts])
    cpSync(join(top, 'build', part), join(app, 'build', part), {
      recursive: true,
      filter: isWanted,
    })
  mkdirSync(join(app, 'build/native-cmake'), { recursive: true })
  const cmakeDir = join(top, 'build/native-cmake')
  const programs = spawnSync('ls', [cmakeDir], { encoding: 'utf8' }).stdout.split('\n')
  for (const program of programs.filter((file) => nativePrograms.test(file))) {
    const to = join(app, 'build/native-cmake', program)
    copyFileSync(join(cmakeDir, program), to)
    spawnSync('strip', [to])
  }
}

/** Random floats do not compress: one family stays, tests of the others say that they skip. */
const isLeftOut = (file) =>
  /^test\/golden\/[^/]+\//.test(file) && !/^test\/golden\/(llama-tied|tokenizers)\//.test(file)

/** What git tracks of these: examples to try, and what the tests read. */
function copyTracked() {
  const parts = ['package.json', 'package-lock.json', 'proto', 'examples', 'docs', 'test/golden']
  const more = ['bench/peers', 'scripts', 'LICENSE', 'README.md']
  const listed = spawnSync('git', ['ls-files', '-z', ...parts, ...more], {
    cwd: top,
    encoding: 'utf8',
    maxBuffer: 1 << 26,
  })
  if (listed.status !== 0) throw new SetupError('the bundle is built from a git checkout')
  for (const file of listed.stdout.split('\0').filter((path) => path !== '')) {
    if (isLeftOut(file) || !existsSync(join(top, file))) continue
    mkdirSync(dirname(join(app, file)), { recursive: true })
    copyFileSync(join(top, file), join(app, file))
  }
  cpSync(join(app, 'examples'), join(root, 'examples'), { recursive: true })
  copyFileSync(join(top, 'LICENSE'), join(root, 'LICENSE'))
}

/** The packages that the program needs at run time, without types, maps and other platforms. */
function copyPackages() {
  const listed = spawnSync('npm', ['ls', '--omit=dev', '--all', '--parseable'], {
    cwd: top,
    encoding: 'utf8',
  })
  const folders = listed.stdout.split('\n').filter((path) => path.includes('node_modules'))
  if (folders.length === 0) throw new SetupError(`npm ls failed: ${listed.stderr}`)
  const isWanted = (path) =>
    !/\.(map|ts|mts|cts|md|markdown)$/.test(path) &&
    !(/tokenizers\.[\w-]+\.node$/.test(path) && !path.endsWith('tokenizers.linux-x64-gnu.node'))
  for (const folder of folders) {
    const place = relative(top, folder)
    if (place.startsWith('node_modules/@types/')) continue
    cpSync(folder, join(app, place), { recursive: true, filter: isWanted })
  }
}

function copyRuntime(natsServer) {
  copyFileSync(process.execPath, join(root, 'node'))
  copyFileSync(natsServer, join(root, 'nats-server'))
  for (const program of ['node', 'nats-server']) {
    chmodSync(join(root, program), 0o755)
    spawnSync('strip', [join(root, program)])
  }
  writeFileSync(join(root, 'tunemesh'), launcher, { mode: 0o755 })
}

function pack() {
  const archive = join(outDir, `${name}.tar.xz`)
  run('tar', ['-C', outDir, '--owner=0', '--group=0', '--sort=name', '-cJf', archive, name], {
    env: { ...process.env, XZ_OPT: '-9 -T2' },
  })
  const bytes = statSync(archive).size
  if (bytes > maxArchiveBytes)
    throw new SetupError(
      `BUNDLE_TOO_LARGE ${archive} has ${bytes} bytes, more than ${maxArchiveBytes}.`,
    )
  console.log(`${archive}  ${(bytes / 1024 / 1024).toFixed(1)} MiB`)
}

await runTool(async () => {
  needLinuxX64()
  rmSync(outDir, { recursive: true, force: true })
  mkdirSync(app, { recursive: true })
  copyBuilt()
  finishBuilt()
  copyTracked()
  copyPackages()
  copyRuntime(await setupNatsServer())
  pack()
})
