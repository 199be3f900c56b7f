/** Who may call: one secret token a state folder, one-time tickets and cookies for the browser. */
import { createHash, createHmac, randomBytes, timingSafeEqual } from 'node:crypto'
import {
  type Metadata,
  ServerInterceptingCall,
  type ServerInterceptingCallInterface,
  type ServerInterceptor,
} from '@grpc/grpc-js'
import { TunemeshError } from '../proto/errors.js'
import { rpcStatusOf } from '../proto/rpc-error.js'

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
