/** Where `--listen` opens the mesh to other hosts, and by which names they may find it there. */
import { once } from 'node:events'
import { createServer, isIP } from 'node:net'
import { networkInterfaces } from 'node:os'
import { TunemeshError } from '../proto/errors.js'
import { coordinatorTlsName, inAddress } from '../proto/tls.js'

/** Beside 8471 and 8470 of loopback; gradients take the next one. */
const defaultTlsPort = 8472

export interface ListenAddress {
  /** Address or name to bind, without brackets. */
  host: string
  /** Of gRPC; the next one is that of NATS. 0: any two free ones. */
  port: number
}

/** HOST, HOST:PORT, [IPV6]:PORT. @throws TunemeshError JOB_INVALID */
export function parseListenAddress(text: string): ListenAddress {
  if (isIP(text) === 6) return { host: text, port: defaultTlsPort }
  const [, bracketed, plain, portText] = /^(?:\[([^\]]+)\]|([^:[\]]+))(?::(\d+))?$/.exec(text) ?? []
  const host = bracketed ?? plain ?? ''
  const port = portText === undefined ? defaultTlsPort : Number(portText)
  const isRight = bracketed === undefined ? host !== '' : isIP(host) === 6
  if (isRight && port <= 65_534) return { host, port }
  throw new TunemeshError(
    'JOB_INVALID',
    `--listen ${text} is no address. Write HOST or HOST:PORT with a port up to 65534, for ` +
      'example 0.0.0.0, 192.168.1.5:8472 or [::]:8472; the next port is used too.',
  )
}

/** @throws TunemeshError JOB_INVALID: nothing can be bound there */
export async function assertOwnAddress(host: string): Promise<void> {
  const probe = createServer()
  const listening = once(probe, 'listening')
  probe.listen(0, host)
  try {
    await listening
  } catch (cause) {
    const own = ['0.0.0.0', ...machineAddresses()].join(', ')
    throw new TunemeshError(
      'JOB_INVALID',
      `--listen ${host} is no address of this machine: ${(cause as Error).message}. ` +
        `Choose one of ${own}.`,
      { cause },
    )
  }
  probe.close()
  await once(probe, 'close')
}

const isWildcard = (host: string): boolean => host === '0.0.0.0' || host === '::'

/** Where this machine itself reaches what is bound to `host`. */
export const hereOf = (host: string): string => (isWildcard(host) ? '127.0.0.1' : host)

/** All names and addresses that the server's certificate has. */
export function serverNames(host: string, hostName: string): string[] {
  const own = isWildcard(host) ? [hostName, ...machineAddresses()] : [host]
  const known = own.filter((name) => isIP(name) !== 0 || /^[a-z\d.-]+$/i.test(name))
  return [...new Set([coordinatorTlsName, 'localhost', '127.0.0.1', '::1', ...known])]
}

/** The host of the join line: the first address by which other hosts may find this one. */
export function joinHost(host: string): string {
  return inAddress(isWildcard(host) ? (machineAddresses()[0] ?? hereOf(host)) : host)
}

/** IPv4 first; none of loopback. */
function machineAddresses(): string[] {
  return Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .filter(({ internal, address }) => !internal && !address.startsWith('fe80'))
    .sort((a, b) => a.family.localeCompare(b.family))
    .map(({ address }) => address)
}
