// npm run dev [-- OPTIONS OF tunemesh up]: an embedded mesh with the dashboard; rebuilds and
// restarts when sources change.
import { spawn } from 'node:child_process'
import { watch } from 'node:fs'
import { join } from 'node:path'
import { top } from './tools.mjs'

/**
 * What a change in each folder rebuilds (see build.mjs). Native sources are built by hand: it takes
 * minutes.
 */
const partOf = {
  proto: 'ts',
  coordinator: 'ts',
  worker: 'ts',
  client: 'ts',
  cli: 'ts',
  dashboard: 'dashboard',
}
/** An editor writes several files at once: wait until it is done. */
const quietMs = 300

const options = process.argv.slice(2)
const due = new Set()
let mesh = null
let isBusy = false
let isEnding = false
let timer

const ended = (child) =>
  new Promise((resolve) => {
    if (child.exitCode !== null || child.signalCode !== null) resolve(child.exitCode)
    else child.once('exit', resolve)
  })

function startMesh() {
  // A group of its own: a terminal's Ctrl-C reaches only us, and we pass it on.
  const child = spawn(process.execPath, [join(top, 'build/cli/main.js'), 'up', ...options], {
    cwd: top,
    stdio: ['ignore', 'inherit', 'inherit'],
    detached: true,
  })
  child.once('exit', (code) => {
    if (mesh !== child) return
    mesh = null
    if (!isEnding) console.log(`the mesh ended (${code}); it starts again at the next change`)
  })
  mesh = child
}

async function stopMesh() {
  const child = mesh
  mesh = null
  child?.kill('SIGINT')
  if (child) await ended(child)
}

async function rebuild() {
  if (isBusy || isEnding || due.size === 0) return
  isBusy = true
  const parts = [...due]
  due.clear()
  console.log(`changed: building ${parts.join(', ')}`)
  const build = spawn(process.execPath, [join(top, 'scripts/build.mjs'), ...parts], {
    stdio: 'inherit',
  })
  const status = await ended(build)
  if (status === 0 && !isEnding) {
    await stopMesh()
    if (!isEnding) startMesh()
  } else if (!isEnding) console.log('the build failed: the mesh runs on as it was')
  isBusy = false
  await rebuild()
}

function noteChange(folder, name) {
  // The build itself writes proto/gen.
  if (name === null || name.startsWith('gen') || !/\.(ts|tsx|css|html|proto|svg)$/.test(name))
    return
  due.add(partOf[folder])
  clearTimeout(timer)
  timer = setTimeout(rebuild, quietMs)
}

const watchers = Object.keys(partOf).map((folder) =>
  watch(join(top, folder), { recursive: true }, (_, name) => noteChange(folder, name)),
)

async function end() {
  if (isEnding) {
    mesh?.kill('SIGINT') // twice: now
    return
  }
  isEnding = true
  clearTimeout(timer)
  for (const watcher of watchers) watcher.close()
  await stopMesh()
}
process.on('SIGINT', end)
process.on('SIGTERM', end)

console.log('Sources are watched; Ctrl-C ends the mesh.')
startMesh()
