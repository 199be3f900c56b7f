/**
 * Runs one program for as long as the pipe on stdin stays open: `node watcher.js PROGRAM ARGS…`.
 *
 * The kernel closes the pipe when the parent ends, however it ends, also by kill -9; a program that
 * does not read stdin (nats-server) would outlive it. The first line on stdout is the program's
 * pid.
 */
import { spawn } from 'node:child_process'

/** After SIGTERM, how long the program may take before SIGKILL. */
const graceMs = 5_000

const [program, ...args] = process.argv.slice(2)
if (program === undefined) {
  process.stderr.write('usage: watcher PROGRAM [ARGS…]\n')
  process.exit(2)
}

const child = spawn(program, args, { stdio: ['ignore', 'ignore', 'inherit'] })

child.on('error', (error) => {
  process.stderr.write(`${error.message}\n`)
  process.exit(127)
})
child.on('exit', (code, signal) => process.exit(code ?? (signal === null ? 1 : 128)))
if (child.pid !== undefined) process.stdout.write(`${child.pid}\n`)

const endChild = () => {
  child.kill('SIGTERM')
  setTimeout(() => child.kill('SIGKILL'), graceMs).unref()
}

process.stdin.resume()
process.stdin.on('end', endChild)
process.stdin.on('error', endChild)
// A terminal's Ctrl-C reaches the whole group; the parent decides when its children end.
process.on('SIGINT', () => {})
process.on('SIGTERM', endChild)
// The parent may be gone already when a line is written to it.
process.stdout.on('error', () => {})
