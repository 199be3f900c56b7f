/** Joins a mesh with a token: whom it names is checked before its secret buys a certificate. */
import { generateKeyPairSync, X509Certificate } from 'node:crypto'
import { credentials } from '@grpc/grpc-js'
import { TunemeshError } from '../proto/errors.js'
import type { Certificate__Output } from '../proto/gen/tunemesh/v1/Certificate.js'
import { decodeJoinToken } from '../proto/join-token.js'
import { JoinService } from '../proto/services.js'
import { certificateRequest, fingerprintOf, inAddress } from '../proto/tls.js'
import { version } from '../proto/version.js'
import { JoinedHost, pemOfKey, storedOf, tlsChannelOptions } from './joined-host.js'
import { withRetries } from './retry.js'
import { callOnce, type StartUnary } from './rpc.js'
import { pinnedAuthority } from './tls-probe.js'

const joinDeadlineMs = 20_000
const defaultPort = 8472

export interface JoinOptions {
  /** HOST:PORT */
  address: string
  token: string
  /** Of this machine, for the coordinator's log. */
  hostName: string
  stateDir: string
  nowMs: number
}

/**
 * Answers with what the host has of an earlier join of the same mesh, without using the token up:
 * the same command starts a worker again.
 * @throws TunemeshError CERTIFICATE_INVALID: another authority than the token's answers;
 *   JOIN_REFUSED: the coordinator does not take the token; TLS_REQUIRED, COORDINATOR_UNREACHABLE
 */
export async function joinMesh(options: JoinOptions): Promise<JoinedHost> {
  const { address, stateDir, nowMs, hostName } = options
  const { fingerprint, secret } = decodeJoinToken(options.token)
  const path = JoinedHost.pathFor(stateDir, address)
  const earlier = JoinedHost.read(path)
  if (earlier !== null && !earlier.hasExpired(nowMs) && isOf(earlier, fingerprint)) return earlier
  const ca = await withRetries(() => pinnedAuthority(address, fingerprint))
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
  const request = {
    version,
    host: hostName,
    secret,
    certificateRequest: certificateRequest(privateKey),
  }
  const roots = credentials.createSsl(Buffer.from(ca))
  const service = new JoinService(address, roots, tlsChannelOptions)
  try {
    const start: StartUnary<Certificate__Output> = (m, o, done) => service.join(request, m, o, done)
    // The same key again is answered again, so that a lost answer does not cost the token.
    const context = { token: '', deadlineMs: joinDeadlineMs }
    const issued = await withRetries(() => callOnce(start, context))
    return JoinedHost.keep(path, { ...storedOf(issued), ca, address, key: pemOfKey(privateKey) })
  } finally {
    service.close()
  }
}

const isOf = ({ ca }: JoinedHost, fingerprint: Buffer) =>
  fingerprintOf(new X509Certificate(ca).raw).equals(fingerprint)

/** What `--join` names: HOST:PORT, and whether TLS was asked for. @throws TunemeshError */
export function parseJoinUrl(text: string): { address: string; isTls: boolean } {
  if (!text.includes('://')) return { address: text, isTls: false }
  const url = URL.canParse(text) ? new URL(text) : null
  if (url?.protocol !== 'https:' || url.hostname === '') {
    throw new TunemeshError(
      'TLS_REQUIRED',
      `--join ${text} is not https://HOST:PORT. Use the join line that \`tunemesh up --listen\` ` +
        'or `tunemesh token` printed.',
    )
  }
  const host = inAddress(url.hostname.replace(/^\[(.*)\]$/, '$1'))
  return { address: `${host}:${url.port === '' ? portOf(text) : url.port}`, isTls: true }
}

/** URL drops 443, which it takes for granted. */
const portOf = (text: string) => (/:443\/?$/.test(text) ? 443 : defaultPort)
