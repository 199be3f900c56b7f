// All that a new machine needs: packages, build, nats-server. Does only what is missing; safe to
// run again.
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { run, runTool, SetupError, top } from './tools.mjs'

const marker = (name) => join(top, 'node_modules', `.tunemesh-${name}`)
const isCurrent = (name, value) =>
  existsSync(marker(name)) && readFileSync(marker(name), 'utf8') === value
const digest = (file) => createHash('sha256').update(readFileSync(file)).digest('hex')

function needNode() {
  const major = Number(process.versions.node.split('.')[0])
  if (major < 20)
    throw new SetupError(
      `BUILD_TOOL_MISSING Node ${process.versions.node} is too old: 20 or newer is needed. ` +
        'Get it from nodejs.org or your package manager.',
    )
}

function installPackages() {
  const lock = digest(join(top, 'package-lock.json'))
  if (isCurrent('lock', lock)) return
  // Not `npm ci`: it refuses a lockfile that lacks optional packages of other platforms, and some
  // registries do not carry all of those. Versions and checksums are the lockfile's either way.
  console.log('installing packages (npm install, versions of package-lock.json)')
  run('npm', ['install', '--no-save', '--no-fund', '--no-audit', '--loglevel=error'])
  writeFileSync(marker('lock'), lock)
}

const sourceDirs = [
  'proto',
  'coordinator',
  'worker',
  'client',
  'cli',
  'bench',
  'test',
  'examples',
  'native',
  'dashboard',
  'scripts',
]

/** Hash of names, sizes and times of all sources: tells whether a build is due. */
function sourceStamp() {
  const hash = createHash('sha256')
  const visit = (dir) => {
    for (const entry of readdirSync(join(top, dir), { withFileTypes: true }).sort((a, b) =>
      a.name < b.name ? -1 : 1,
    )) {
      const path = `${dir}/${entry.name}`
      if (path === 'proto/gen' || path === 'test/golden') continue
      if (entry.isDirectory()) visit(path)
      else if (/\.(ts|tsx|mjs|proto|cc|h|cuh|cu|css|html|json|txt)$/.test(entry.name)) {
        const stat = statSync(join(top, path))
        hash.update(`${path} ${stat.size} ${stat.mtimeMs}\n`)
      }
    }
  }
  for (const dir of sourceDirs) if (existsSync(join(top, dir))) visit(dir)
  return hash.digest('hex')
}

/** Without `--product` also the C++ tests and benchmarks, which only a developer runs. */
function build() {
  const stamp = sourceStamp()
  const isProduct = process.argv.includes('--product')
  const isBuilt = (what) =>
    existsSync(join(top, 'build/native/tunemesh.node')) && isCurrent(what, stamp)
  if (isBuilt('build') || (isProduct && isBuilt('product'))) return
  console.log('building')
  run(process.execPath, ['scripts/build.mjs', ...(isProduct ? ['--product'] : [])])
  writeFileSync(marker(isProduct ? 'product' : 'build'), stamp)
}

await runTool(async () => {
  needNode()
  installPackages()
  build()
  if (existsSync(join(top, 'scripts/nats-setup.mjs'))) {
    const { setupNatsServer } = await import('./nats-setup.mjs')
    await setupNatsServer()
  }
})
