/**
 * Who may call: one secret token a state folder, certificates for worker hosts, one-time tickets
 * and cookies for the browser.
 */
import { createHash, createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import {
  type Metadata,
  ServerInterceptingCall,
  type ServerInterceptingCallInterface,
  type ServerInterceptor,
} from '@grpc/grpc-js'
import { TunemeshError } from '../proto/errors.js'
import { rpcStatusOf } from '../proto/rpc-error.js'
import { workerUnit } from '../proto/tls.js'
import type { HostCalls } from './host-calls.js'
import { hostRevoked } from './joined-hosts.js'

export const newSecret = () => randomBytes(32).toString('base64url')

/** Compares without telling by its duration how much was right. */
function isSameSecret(given: string, secret: string): boolean {
  const hash = (text: string) => createHash('sha256').update(text).digest()
  return timingSafeEqual(hash(given), hash(secret))
}

/** Refuses every call of every service, health and reflection included, that lacks the token. */
export function tokenInterceptor(token: string): ServerInterceptor {
  return (_method, call: ServerInterceptingCallInterface) =>
    new ServerInterceptingCall(call as ServerInterceptingCall, {
      start: (next) =>
        next({
          onReceiveMetadata: (metadata, proceed) => {
            if (hasToken(metadata, token)) proceed(metadata)
            else call.sendStatus(rpcStatusOf(notAuthenticated()))
          },
        }),
    })
}

function hasToken(metadata: Metadata, token: string): boolean {
  const header = metadata.get('authorization')[0]
  if (typeof header !== 'string') return false
  const given = /^bearer +(\S+)$/i.exec(header)?.[1]
  return given !== undefined && isSameSecret(given, token)
}

/** The part of a call that says who is at the other end of its connection. */
interface Connected {
  getAuthContext(): ReturnType<ServerInterceptingCallInterface['getAuthContext']>
}

/** Identity of the worker host that has called; null: no certificate of this mesh's workers. */
export function workerHostOf(call: Connected): string | null {
  const subject = call.getAuthContext().sslPeerCertificate?.subject
  return subject?.OU === workerUnit && typeof subject.CN === 'string' ? subject.CN : null
}

/** Without a certificate: the token in the request speaks for the caller. */
const openToAll = '/tunemesh.v1.JoinService/Join'
/** Where a host's certificate counts, and for the first two only it. */
const forWorkers = /^\/tunemesh\.v1\.(WorkerService\/|JoinService\/Renew$|BlobService\/)/
const forOwners = /^\/tunemesh\.v1\.BlobService\//

/** Which worker hosts may call, and what they have under way. */
export interface HostGate {
  isRevoked(hostId: string): boolean
  calls: HostCalls
}

/** On the TLS port: a worker host does a worker's calls, the owner's token all others. */
export function remoteInterceptor(token: string, gate: HostGate): ServerInterceptor {
  return (method, call: ServerInterceptingCallInterface) => {
    let ended = () => {}
    return new ServerInterceptingCall(call as ServerInterceptingCall, {
      start: (next) =>
        next({
          onReceiveMetadata: (metadata, proceed) => {
            const hostId = workerHostOf(call)
            const refusal =
              hostId !== null && gate.isRevoked(hostId)
                ? hostRevoked(hostId)
                : refusalOf({ path: method.path, metadata, token }, call)
            if (refusal !== null) return call.sendStatus(rpcStatusOf(refusal))
            if (hostId !== null) ended = gate.calls.began(hostId, call)
            proceed(metadata)
          },
          onCancel: () => ended(),
        }),
      sendStatus: (status, next) => {
        ended()
        next(status)
      },
    })
  }
}

function refusalOf(
  { path, metadata, token }: { path: string; metadata: Metadata; token: string },
  call: Connected,
): TunemeshError | null {
  if (path === openToAll) return null
  if (!forWorkers.test(path)) return hasToken(metadata, token) ? null : notOwner()
  if (workerHostOf(call) !== null) return null
  return forOwners.test(path) && hasToken(metadata, token) ? null : noCertificate()
}

/**
 * What a worker shows to go on under the id it had: only this mesh can have made it, and it counts
 * for one id on one host.
 */
export class WorkerProofs {
  readonly #key: Buffer

  /** @param secret outlives a restart, so that workers find themselves again */
  constructor(secret: string) {
    this.#key = createHmac('sha256', secret).update('worker ids').digest()
  }

  /** @param hostId of its certificate; empty: on loopback, where there is none */
  proofOf(workerId: string, hostId: string): string {
    return createHmac('sha256', this.#key).update(`${hostId}\n${workerId}`).digest('base64url')
  }

  isProof(given: string, workerId: string, hostId: string): boolean {
    return isSameSecret(given, this.proofOf(workerId, hostId))
  }
}

const notOwner = () =>
  new TunemeshError(
    'NOT_AUTHENTICATED',
    "From another host this call needs the owner's token; a worker's certificate is not enough. " +
      'Give --token-file with the file `token` of the state folder, or ask on its machine.',
  )

const noCertificate = () =>
  new TunemeshError(
    'CERTIFICATE_INVALID',
    'The connection shows no certificate of this mesh: none was sent, it is of another ' +
      'authority, or it has expired. Join again with a new token: tunemesh token prints one.',
  )

const notAuthenticated = () =>
  new TunemeshError(
    'NOT_AUTHENTICATED',
    'The call carries no valid token. Send metadata "authorization: Bearer TOKEN"; ' +
      'endpoint.json in the state folder has it.',
  )

const ticketLifeMs = 10 * 60_000
const maxTickets = 32
const cookieLifeMs = 30 * 24 * 3_600_000

/** One-time tickets for the dashboard's address, each exchanged for a cookie. */
export class BrowserAccess {
  readonly #tickets = new Map<string, number>()
  readonly #key: Buffer

  /** @param secret outlives a restart, so that an open page finds the coordinator again */
  constructor(
    secret: string,
    private readonly nowMs: () => number,
  ) {
    this.#key = createHmac('sha256', secret).update('dashboard cookie').digest()
  }

  newTicket(): string {
    const ticket = newSecret()
    this.#tickets.set(ticket, this.nowMs() + ticketLifeMs)
    for (const oldest of this.#tickets.keys()) {
      if (this.#tickets.size <= maxTickets) break
      this.#tickets.delete(oldest)
    }
    return ticket
  }

  /** The cookie's value; null where the ticket is unknown, used or too old. */
  redeem(ticket: string): string | null {
    const validUntil = this.#tickets.get(ticket)
    this.#tickets.delete(ticket)
    if (validUntil === undefined || validUntil < this.nowMs()) return null
    const content = `${this.nowMs()}.${randomBytes(12).toString('base64url')}`
    return `${content}.${this.#sign(content)}`
  }

  isValid(cookie: string): boolean {
    const [issuedMs = '', nonce = '', signature = ''] = cookie.split('.')
    if (!isSameSecret(signature, this.#sign(`${issuedMs}.${nonce}`))) return false
    return this.nowMs() - Number(issuedMs) < cookieLifeMs
  }

  #sign(content: string): string {
    return createHmac('sha256', this.#key).update(content).digest('base64url')
  }
}
