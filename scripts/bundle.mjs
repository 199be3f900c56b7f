// npm run bundle: one archive that runs on a bare linux-x64 machine: Node, the compiled program,
// its packages, the native libraries, nats-server, examples and tests. Prints the archive's path.
// --sizes also packs each part alone and prints what it has: what to look at where it grows.
// --fast packs in seconds what is unpacked at once, as a test does; larger, whatever the limit.
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
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { dirname, join, relative } from 'node:path'
import { setupNatsServer } from './nats-setup.mjs'
import { run, runTool, SetupError, top } from './tools.mjs'

/** The archive, a checkout and a peer's wheels must travel together. */
const maxArchiveBytes = 40_000_000
/**
 * Everything within one dictionary, as test programs share most of their code, and jumps of x86
 * code made comparable first.
 */
const xzOptions = '-T1 --x86 --lzma2=preset=6,dict=192MiB'
const isFast = process.argv.includes('--fast')
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
#   ./tunemesh dev product|golden|same-bits|bench|bench:gpu|sanitize|test …   as \`npm run\` does
here=$(dirname "$(readlink -f "$0")")
: "\${TUNEMESH_NATS_SERVER:=$here/nats-server}"
export TUNEMESH_NATS_SERVER
if [ "$1" = dev ]; then
  what=\${2:-nothing}
  [ $# -ge 2 ] && shift 2
  case $what in
    product) program=build/test/product-run/product.js ;;
    golden) program=build/test/golden-run/golden.js ;;
    same-bits) program=build/test/golden-run/same-bits.js ;;
    bench) program=build/bench/bench.js ;;
    bench:gpu) program=build/bench/gpu.js ;;
    sanitize) program=scripts/sanitize.mjs ;;
    test) program=scripts/test.mjs ;;
    *)
      echo "tunemesh dev product|golden|same-bits|bench|bench:gpu|sanitize|test, not $what" >&2
      exit 2 ;;
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
  const more = ['bench/peers', 'scripts', 'LICENSE', 'README.md', 'test/native/*.json']
  more.push('ARCHITECTURE.md', 'CHANGELOG.md', 'CONTRIBUTING.md')
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
  // The rest of what they refer to lies in app/.
  for (const name of ['README.md', 'docs']) symlinkSync(join('app', name), join(root, name))
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

/** A plugin of other sources than the engine's would be refused by each worker. */
function checkPlugin() {
  const worker = join(app, 'build/worker/main.js')
  const done = spawnSync(join(root, 'node'), [worker, '--list-gpus'], { encoding: 'utf8' })
  const found = done.status === 0 ? JSON.parse(done.stdout) : { problem: done.stderr }
  if (found.plugin === '' || !/interface|can't be loaded|no plugin/.test(found.problem)) return
  throw new SetupError(
    `BUNDLE_PLUGIN_STALE ${found.problem} Run: node scripts/build.mjs native cuda`,
  )
}

function pack() {
  const archive = join(outDir, `${name}.tar.xz`)
  const bytes = tarOf(archive, [name])
  if (bytes > maxArchiveBytes && !isFast)
    throw new SetupError(
      `BUNDLE_TOO_LARGE ${archive} has ${bytes} bytes, more than ${maxArchiveBytes}.`,
    )
  console.log(`${archive}  ${(bytes / 1e6).toFixed(1)} MB`)
}

function tarOf(archive, paths) {
  run('tar', ['-C', outDir, '--owner=0', '--group=0', '--sort=name', '-cJf', archive, ...paths], {
    env: { ...process.env, XZ_OPT: isFast ? '-T0 -0' : xzOptions },
  })
  return statSync(archive).size
}

/** Each part alone: together they are less, for what they share. */
function printSizes() {
  const parts = ['node', 'nats-server', 'app/build/native/tunemesh_cuda.so']
  parts.push('app/build/native/tunemesh.node', 'app/build/native-cmake', 'app/node_modules')
  parts.push('app/build', 'app/test', 'examples')
  for (const part of parts.filter((path) => existsSync(join(root, path)))) {
    const archive = join(outDir, 'part.tar.xz')
    const bytes = tarOf(archive, [join(name, part)])
    const unpacked = Number(
      spawnSync('du', ['-sb', join(root, part)])
        .stdout.toString()
        .split('\t')[0],
    )
    const inMb = (count) => `${(count / 1e6).toFixed(1)} MB`.padStart(9)
    console.log(`${part.padEnd(36)}${inMb(bytes)} of ${inMb(unpacked)}`)
    rmSync(archive)
  }
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
  checkPlugin()
  pack()
  if (process.argv.includes('--sizes')) printSizes()
})
