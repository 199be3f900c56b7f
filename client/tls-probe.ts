/** Looks at what speaks at an address, before anything secret is said to it. */
import tls from 'node:tls'
import { TunemeshError } from '../proto/errors.js'
import { certificatePem, coordinatorTlsName, fingerprintOf } from '../proto/tls.js'

const timeoutMs = 10_000

/**
 * The authority (DER) at the end of the chain that the other side shows. Nothing of it is trusted
 * yet.
 * @param address HOST:PORT
 * @throws TunemeshError TLS_REQUIRED: it speaks, but no TLS; COORDINATOR_UNREACHABLE
 */
function presentedAuthority(address: string): Promise<Buffer> {
  const { host, port } = hostAndPort(address)
  return new Promise((resolve, reject) => {
    const socket = tls.connect({
      host,
      port,
      servername: coordinatorTlsName,
      rejectUnauthorized: false,
      minVersion: 'TLSv1.3',
      ALPNProtocols: ['h2'],
    })
    const fail = (error: TunemeshError) => {
      socket.destroy()
      reject(error)
    }
    socket.setTimeout(timeoutMs, () => fail(unreachable(address, `no answer in ${timeoutMs} ms`)))
    socket.once('error', (error: NodeJS.ErrnoException) => fail(failureOf(address, error)))
    socket.once('secureConnect', () => {
      const authority = lastOf(socket.getPeerCertificate(true))
      socket.destroy()
      if (authority !== null) resolve(authority)
      else reject(unreachable(address, 'it shows no certificate'))
    })
  })
}

export const speaksTls = (address: string): Promise<boolean> =>
  presentedAuthority(address).then(
    () => true,
    () => false,
  )

/** PEM of the authority at `address`. @throws TunemeshError CERTIFICATE_INVALID: another one */
export async function pinnedAuthority(address: string, fingerprint: Buffer): Promise<string> {
  const authority = await presentedAuthority(address)
  const seen = fingerprintOf(authority)
  if (seen.equals(fingerprint)) return certificatePem(authority)
  throw new TunemeshError(
    'CERTIFICATE_INVALID',
    `${address} shows the authority sha256:${seen.toString('hex')}, and the one to trust is ` +
      `sha256:${fingerprint.toString('hex')}. Nothing was sent to it. If the coordinator was set ` +
      'up anew, get a new join line from it; else somebody answers in its place.',
  )
}

export function hostAndPort(address: string): { host: string; port: number } {
  const at = address.lastIndexOf(':')
  const host = address.slice(0, at).replace(/^\[(.*)\]$/, '$1')
  return { host, port: Number(address.slice(at + 1)) }
}

function lastOf(certificate: tls.DetailedPeerCertificate): Buffer | null {
  let last = certificate
  // Of ours there are two; the last one has signed itself.
  for (let turn = 0; turn < 8 && last.issuerCertificate; turn++) {
    if (last.issuerCertificate === last) break
    last = last.issuerCertificate
  }
  return last.raw ?? null
}

function failureOf(address: string, error: NodeJS.ErrnoException): TunemeshError {
  const isPlain = error.code === 'EPROTO' || error.code?.startsWith('ERR_SSL_') === true
  if (!isPlain) return unreachable(address, error.message, error)
  return new TunemeshError(
    'TLS_REQUIRED',
    `${address} does not speak TLS. Join by the address that \`tunemesh up --listen\` printed; ` +
      'the port of clients on its own machine is another one.',
    { cause: error },
  )
}

const unreachable = (address: string, reason: string, cause?: unknown) =>
  new TunemeshError(
    'COORDINATOR_UNREACHABLE',
    `${address} can not be reached by TLS: ${reason}. Is \`tunemesh up --listen\` running there, ` +
      'and does a firewall let its two ports through?',
    { cause },
  )
