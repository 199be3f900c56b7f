/** JoinService: certificates for worker hosts, and tokens that get them one. */
import type { Logger } from 'pino'
import { TunemeshError } from '../proto/errors.js'
import type { Certificate } from '../proto/gen/tunemesh/v1/Certificate.js'
import type { JoinRequest__Output } from '../proto/gen/tunemesh/v1/JoinRequest.js'
import type { JoinServiceHandlers } from '../proto/gen/tunemesh/v1/JoinService.js'
import type { NewTokenRequest__Output } from '../proto/gen/tunemesh/v1/NewTokenRequest.js'
import type { NewTokenResponse } from '../proto/gen/tunemesh/v1/NewTokenResponse.js'
import type { RenewRequest__Output } from '../proto/gen/tunemesh/v1/RenewRequest.js'
import type { RevokeHostRequest__Output } from '../proto/gen/tunemesh/v1/RevokeHostRequest.js'
import { publicKeyDer, requestedKey } from '../proto/tls.js'
import { version } from '../proto/version.js'
import { workerHostOf } from './access.js'
import type { IssuedCertificate } from './certificate-authority.js'
import { hostRevoked } from './joined-hosts.js'
import type { RemoteAccess } from './remote-access.js'
import type { RpcHandlers } from './rpc-handlers.js'

/** One of P-256 has about 200. */
const maxRequestBytes = 4_096
const maxTtlMs = 30 * 24 * 3_600_000
const maxUses = 1_000
/** Of a certificate's life: a host that was off for the other two thirds joins without a token. */
const renewAfterShare = 1 / 3

export interface JoinServiceOptions {
  /** null: the coordinator listens on loopback only. */
  remote: RemoteAccess | null
  rpc: RpcHandlers
  /** Ends everything that a revoked host has open. Answers how many workers that were. */
  putOut(hostId: string): Promise<number>
  log: Logger
}

export function joinHandlers({
  remote,
  rpc,
  putOut,
  log,
}: JoinServiceOptions): JoinServiceHandlers {
  return {
    Join: rpc.unary((request: JoinRequest__Output, call) => {
      try {
        return join(opened(remote), request, log)
      } catch (error) {
        const { host } = request
        log.warn({ host, peer: call.getPeer(), err: error }, 'a host was refused')
        throw error
      }
    }),
    Renew: rpc.unary((request: RenewRequest__Output, call) => {
      const hostId = workerHostOf(call)
      if (hostId === null) throw noCertificate()
      const key = keyIn(request.certificateRequest)
      const { authority, options, hosts } = opened(remote)
      const life = lifeNow(options)
      log.info({ hostId }, 'a worker host renews its certificate')
      const issued = authority.worker(key, life, hostId)
      hosts.note({ ...issued, host: '' })
      return message(issued, life)
    }),
    NewToken: rpc.unary((request: NewTokenRequest__Output): NewTokenResponse => {
      const { ttlMs, uses } = request
      if (!(ttlMs >= 1_000 && ttlMs <= maxTtlMs && uses >= 1 && uses <= maxUses)) {
        throw new TunemeshError(
          'JOB_INVALID',
          `A join token for ${uses} hosts within ${ttlMs / 1_000} s is not possible: it counts ` +
            `for 1 s to 30 days and 1 to ${maxUses} hosts.`,
        )
      }
      return opened(remote).newToken({ ttlMs, uses })
    }),
    RevokeHost: rpc.unary(async ({ host: name }: RevokeHostRequest__Output) => {
      const { hosts } = opened(remote)
      const { hostId, host } = hosts.revoke(name)
      const numWorkers = await putOut(hostId)
      log.warn({ hostId, host, numWorkers }, 'a worker host was revoked')
      return { hostId, host, numWorkers }
    }),
  }
}

function join(remote: RemoteAccess, request: JoinRequest__Output, log: Logger): Certificate {
  const { secret, host } = request
  if (request.version !== version) {
    throw new TunemeshError(
      'VERSION_MISMATCH',
      `Worker on ${host} runs tunemesh ${request.version}, the coordinator ${version}. ` +
        'Install the same version on both; the token is not used up.',
    )
  }
  const key = keyIn(request.certificateRequest)
  const life = lifeNow(remote.options)
  const issued = remote.authority.worker(key, life)
  if (remote.hosts.isRevoked(issued.hostId)) throw hostRevoked(issued.hostId)
  // Durable before the certificate leaves: a crash in between costs a token, not its being once.
  remote.tokens.use(secret, publicKeyDer(key))
  remote.hosts.note({ ...issued, host })
  log.info({ host, hostId: issued.hostId }, 'a worker host joined')
  return message(issued, life)
}

const lifeNow = ({ nowMs, certificateLifeMs }: RemoteAccess['options']) => ({
  nowMs: nowMs(),
  lifeMs: certificateLifeMs,
})

const message = (
  { certificate, hostId, expiresMs }: IssuedCertificate,
  { nowMs, lifeMs }: { nowMs: number; lifeMs: number },
): Certificate => ({
  certificatePem: certificate,
  hostId,
  expiresMs,
  renewMs: nowMs + Math.floor(lifeMs * renewAfterShare),
})

function keyIn(request: Buffer) {
  const key = request.length <= maxRequestBytes ? requestedKey(request) : null
  if (key !== null) return key
  throw new TunemeshError(
    'JOIN_REFUSED',
    `The certificate request of ${request.length} bytes is not PKCS #10 signed by an ECDSA P-256 ` +
      'key. Join with `tunemesh worker` of the same version.',
  )
}

function opened(remote: RemoteAccess | null): RemoteAccess {
  if (remote !== null) return remote
  throw new TunemeshError(
    'STATE_CONFLICT',
    'This coordinator listens on loopback only, where no join token is needed. ' +
      'For workers of other hosts start it with `tunemesh up --listen ADDRESS`.',
  )
}

const noCertificate = () =>
  new TunemeshError('CERTIFICATE_INVALID', 'Only a joined host can renew its certificate.')
