#!/usr/bin/env node
/** The `tunemesh` command: reads argv and environment once, hands over to one file a verb. */
import { readFileSync } from 'node:fs'
import { Command, CommanderError } from 'commander'
import { stateDirFor } from '../client/endpoint.js'
import { errorKinds, TunemeshError } from '../proto/errors.js'
import { version } from '../proto/version.js'
import type { Context } from './context.js'
import { Interrupts } from './interrupts.js'
import { Output } from './output.js'
import { asTunemeshError, renderError } from './render-error.js'
import { addVerbs } from './verbs.js'

interface GlobalOptions {
  server?: string
  tokenFile?: string
  ca?: string
  stateDir?: string
  json?: boolean
  color: boolean
  verbose?: boolean
}

const usageExitCode = 2
const interruptedExitCode = 130

const program = new Command('tunemesh')
  .description('Fine-tune language models on whatever machines you have.')
  .version(version)
  .option('--server <host:port>', 'talk to this coordinator')
  .option('--token-file <path>', 'file with its token (or set TUNEMESH_TOKEN)')
  .option('--ca <path>', 'its authority, where it is on another host: tls/ca.pem of its state')
  .option('--state-dir <path>', 'folder of all state (default: TUNEMESH_HOME, else XDG state)')
  .option('--json', 'results as JSON lines on stdout')
  .option('--no-color', 'no terminal styles (also NO_COLOR)')
  .option('--verbose', 'show the cause of an internal error')
  .showHelpAfterError('(add --help for what there is)')
  .showSuggestionAfterError()
  .exitOverride()

// What reads our output may leave first, as `head` does: that is its right, not a failure.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0)
  throw error
})

const interrupts = new Interrupts(process, () => process.exit(interruptedExitCode))

addVerbs(program, contextNow)

try {
  await program.parseAsync()
} catch (error) {
  process.exitCode = report(error)
}

/** Called by a verb once its options are parsed: global ones may stand before or after it. */
function contextNow(): Context {
  const options = program.opts<GlobalOptions>()
  const { env } = process
  return {
    output: outputFor(options),
    interrupts,
    stateDir: stateDirFor(options.stateDir, env),
    server: options.server,
    token: tokenFrom(options.tokenFile) ?? env.TUNEMESH_TOKEN,
    tlsRoots: rootsFrom(options.ca),
    natsServerPath: env.TUNEMESH_NATS_SERVER || undefined,
    env,
  }
}

function outputFor(options: GlobalOptions): Output {
  const noColor = !options.color || Boolean(process.env.NO_COLOR)
  return new Output(process.stdout, process.stderr, { json: options.json ?? false, noColor })
}

function tokenFrom(path: string | undefined): string | undefined {
  if (path === undefined) return undefined
  try {
    const text = readFileSync(path, 'utf8').trim()
    // The coordinator's endpoint.json may be given as it is.
    return text.startsWith('{') ? String((JSON.parse(text) as { token?: unknown }).token) : text
  } catch (error) {
    throw new TunemeshError(
      'NOT_AUTHENTICATED',
      `The token file ${path} cannot be read: ${(error as Error).message}`,
    )
  }
}

function rootsFrom(path: string | undefined): Buffer | undefined {
  if (path === undefined) return undefined
  try {
    return readFileSync(path)
  } catch (error) {
    throw new TunemeshError(
      'CERTIFICATE_INVALID',
      `The authority ${path} cannot be read: ${(error as Error).message}`,
    )
  }
}

/** Prints a failure once, in the form that was asked for, and gives its exit code. */
function report(error: unknown): number {
  // commander has printed its own words already.
  if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : usageExitCode
  const options = program.opts<GlobalOptions>()
  const output = outputFor(options)
  const known = asTunemeshError(error)
  const { code, message, details } = known
  output.record('error', { error: { code, message, details } })
  if (!output.isJson) output.error(renderError(known, output.style))
  if (options.verbose)
    output.error(String((known.cause as Error | undefined)?.stack ?? known.stack))
  return errorKinds[code].exit
}
