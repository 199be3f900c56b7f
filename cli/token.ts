/** `tunemesh token`: another join line of a coordinator that listens for other hosts. */
import type { JoinLine } from '../client/client.js'
import { TunemeshError } from '../proto/errors.js'
import type { Context } from './context.js'
import { connectTo, findEndpoint } from './mesh.js'
import type { Output } from './output.js'
import { labelled } from './style.js'

export interface TokenOptions {
  /** Seconds. */
  tokenTtl: number
  uses: number
}

export async function token(context: Context, options: TokenOptions): Promise<void> {
  const endpoint = await findEndpoint(context)
  if (endpoint === null) {
    throw new TunemeshError(
      'COORDINATOR_UNREACHABLE',
      `No coordinator runs on ${context.stateDir}. Start one: tunemesh up --listen ADDRESS.`,
    )
  }
  const client = connectTo(context, endpoint)
  try {
    const limits = { ttlMs: options.tokenTtl * 1_000, uses: options.uses }
    const line = await client.newToken(limits)
    context.output.record('join', { ...line })
    showJoinLine(context.output, line, options.uses)
  } finally {
    client.close()
  }
}

/** All that another host has to be told. */
export function showJoinLine(output: Output, line: JoinLine, uses: number): void {
  const { url, token: text, expiresMs } = line
  const until = new Date(expiresMs).toISOString().slice(0, 16).replace('T', ' ')
  const hosts = uses === 1 ? 'one other host' : `${uses} other hosts`
  output.line(labelled(output.style, 'Join', `tunemesh worker --join ${url} --token ${text}`))
  output.note(`For ${hosts}, until ${until} UTC.`)
}
