/**
 * What every verb gets: the places and switches that main.ts read once from argv and environment.
 */
import type { Interrupts } from './interrupts.js'
import type { Output } from './output.js'

export interface Context {
  output: Output
  interrupts: Interrupts
  stateDir: string
  /** HOST:PORT of a coordinator named by the user. */
  server: string | undefined
  token: string | undefined
  /** PEM of the authority of the mesh that `server` is of; without it plain text is spoken. */
  tlsRoots: Buffer | undefined
  natsServerPath: string | undefined
  /** The environment, for `doctor`, which reports on it. */
  env: NodeJS.ProcessEnv
}
