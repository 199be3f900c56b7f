/** What coordinator and worker share of NATS: how they connect, and how they read a stream. */
import { setTimeout as delay } from 'node:timers/promises'
import {
  type NatsConnection as Client,
  type ConnectionOptions,
  connect,
  jwtAuthenticator,
  NatsError,
  ErrorCode as NatsErrorCode,
  RequestStrategy,
} from 'nats'
import { reconnectDelayMs } from './backoff.js'
import { TunemeshError } from './errors.js'
import { inboxPrefix } from './subjects.js'
import { coordinatorTlsName, type TlsIdentity } from './tls.js'

/** A user's signed permissions and the seed of the key they are made out to. */
export interface NatsCredentials {
  jwt: string
  seed: string
}

export interface NatsAddress {
  url: string
  /** The worker's id, `coordinator` or `system`: names the connection and its inbox. */
  user: string
  /** null: a server that asks for none. */
  credentials: NatsCredentials | null
  /** What this end shows where the server speaks TLS; null or absent: plain text. */
  tls?: TlsIdentity | null
}

export interface StoredMessage {
  /** In the stream. */
  sequence: number
  data: Uint8Array
}

export interface PageQuery {
  stream: string
  /** Wildcards allowed. */
  subject: string
  /** In the stream. */
  fromSequence: number
  limit: number
}

const retryMs = 50
const readTimeoutMs = 5_000

/**
 * Reconnects for ever once it is open; `address` is read again at each attempt, so that renewed
 * credentials and certificates count.
 * @throws TunemeshError NATS_UNREACHABLE, at once where the server refuses the credentials
 */
export async function connectNats(
  address: () => NatsAddress,
  limits: { timeoutMs: number; noEcho: boolean },
): Promise<Client> {
  const { url, user } = address()
  let failures = 0
  const options: ConnectionOptions = {
    servers: url,
    name: user,
    noEcho: limits.noEcho,
    inboxPrefix: inboxPrefix(user),
    maxReconnectAttempts: -1,
    // The credentials may be renewed while it is away.
    ignoreAuthErrorAbort: true,
    reconnectDelayHandler: () => reconnectDelayMs(++failures, Math.random()),
    pingInterval: 5_000,
    maxPingOut: 2,
    // Far away, or busy: TLS takes two more turns there and back.
    timeout: address().tls ? 10_000 : 2_000,
    // A server tells its own addresses, which behind NAT are not those by which it is reached.
    ignoreClusterUpdates: true,
  }
  if (address().tls) options.tls = tlsOptions(address)
  if (address().credentials !== null) {
    options.authenticator = jwtAuthenticator(
      () => address().credentials?.jwt ?? '',
      () => new TextEncoder().encode(address().credentials?.seed ?? ''),
    )
  }
  const deadline = performance.now() + limits.timeoutMs
  for (;;) {
    try {
      const client = await connect(options)
      void onReconnect(client, () => {
        failures = 0
      })
      return client
    } catch (cause) {
      if (isRefusal(cause)) throw refused(address(), cause)
      if (performance.now() > deadline) {
        const reason = cause instanceof Error ? cause.message : String(cause)
        const limit = `${limits.timeoutMs} ms`
        const message = `nats-server at ${url} did not answer within ${limit}: ${reason}`
        throw new TunemeshError('NATS_UNREACHABLE', message, { cause })
      }
      await delay(retryMs)
    }
  }
}

async function onReconnect(client: Client, act: () => void): Promise<void> {
  for await (const status of client.status()) if (status.type === 'reconnect') act()
}

/** The client reads each property again for each connection. */
function tlsOptions(address: () => NatsAddress): NonNullable<ConnectionOptions['tls']> {
  const names = { servername: coordinatorTlsName, minVersion: 'TLSv1.3' }
  return {
    ...names,
    get ca() {
      return address().tls?.ca ?? ''
    },
    get cert() {
      return address().tls?.certificate ?? ''
    },
    get key() {
      return address().tls?.key ?? ''
    },
  }
}

/**
 * Up to `limit` messages of a subject (wildcards allowed) from a stream sequence on, in order.
 * Fewer than `limit` means that nothing follows.
 */
export async function readPage(client: Client, query: PageQuery): Promise<StoredMessage[]> {
  const body = { seq: query.fromSequence, next_by_subj: query.subject, batch: query.limit }
  const replies = await client.requestMany(
    `$JS.API.DIRECT.GET.${query.stream}`,
    JSON.stringify(body),
    { strategy: RequestStrategy.SentinelMsg, maxWait: readTimeoutMs },
  )
  const messages: StoredMessage[] = []
  for await (const { headers, data } of replies) {
    const code = headers?.code ?? 0
    // 204 ends the batch, 404 says that nothing lies there or beyond.
    if (code === 204 || code === 404) return messages
    if (code >= 400) throw unreadable(query.stream, headers?.description ?? String(code))
    messages.push({ sequence: Number(headers?.get('Nats-Sequence')), data })
  }
  throw unreadable(query.stream, 'the reply ended half way')
}

/** Every message of a subject from a sequence on, page by page. */
export async function* readSubject(
  reader: { readPage(query: PageQuery): Promise<StoredMessage[]> },
  query: Omit<PageQuery, 'limit'>,
): AsyncGenerator<StoredMessage> {
  const limit = 256
  let { fromSequence } = query
  for (;;) {
    const page = await reader.readPage({ ...query, fromSequence, limit })
    yield* page
    const last = page.at(-1)
    if (last === undefined || page.length < limit) return
    fromSequence = last.sequence + 1
  }
}

const isRefusal = (error: unknown) =>
  error instanceof NatsError &&
  (error.code === NatsErrorCode.AuthorizationViolation ||
    error.code === NatsErrorCode.AuthenticationExpired)

const refused = ({ url, user }: NatsAddress, cause: unknown) =>
  new TunemeshError(
    'NATS_UNREACHABLE',
    `nats-server at ${url} refuses the credentials of ${user}: they have expired or are of ` +
      'another mesh. Attach to the coordinator again for new ones.',
    { cause },
  )

const unreadable = (stream: string, reason: string) =>
  new TunemeshError('NATS_UNREACHABLE', `Stream ${stream} could not be read: ${reason}.`)
