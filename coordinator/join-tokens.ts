/**
 * Join tokens that this mesh has given out. Only hashes of their secrets are kept, in a file 0600;
 * spent and expired ones stay a while, so that whoever uses one hears what is wrong with it.
 */
import { createHash, randomBytes } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { TunemeshError } from '../proto/errors.js'
import { joinSecretBytes } from '../proto/join-token.js'
import { writePrivate } from './state-folder.js'

const maxTokens = 1_000
const rememberedMs = 7 * 24 * 3_600_000

interface StoredToken {
  /** SHA-256 of the secret, hex. */
  hash: string
  expiresMs: number
  usesLeft: number
  /** SHA-256 of the public keys it was used with: a repeated request is answered once more. */
  keys: string[]
}

export class JoinTokens {
  #tokens: StoredToken[]

  /** @param nowMs wall clock */
  constructor(
    private readonly path: string,
    private readonly nowMs: () => number,
  ) {
    this.#tokens = readTokens(path)
  }

  /** @throws TunemeshError STATE_CONFLICT: too many are about */
  issue({ ttlMs, uses }: { ttlMs: number; uses: number }): { secret: Buffer; expiresMs: number } {
    const now = this.nowMs()
    this.#tokens = this.#tokens.filter(({ expiresMs }) => expiresMs + rememberedMs > now)
    if (this.#tokens.length >= maxTokens) {
      throw new TunemeshError(
        'STATE_CONFLICT',
        `${maxTokens} join tokens are remembered, which is the limit; each is forgotten a week ` +
          'after it expired. One token serves several workers: tunemesh token --uses N.',
      )
    }
    const secret = randomBytes(joinSecretBytes)
    const expiresMs = now + ttlMs
    this.#tokens.push({ hash: hashOf(secret), expiresMs, usesLeft: uses, keys: [] })
    this.#save()
    return { secret, expiresMs }
  }

  /**
   * Durable when it returns.
   * @param key public key of the one who asks, DER
   * @throws TunemeshError JOIN_REFUSED: why it does not count
   */
  use(secret: Buffer, key: Buffer): void {
    const token = this.#valid(secret, key)
    if (token.keys.includes(hashOf(key))) return
    token.usesLeft--
    token.keys.push(hashOf(key))
    this.#save()
  }

  #valid(secret: Buffer, key: Buffer): StoredToken {
    const hash = hashOf(secret)
    const token = this.#tokens.find((candidate) => candidate.hash === hash)
    if (token === undefined) {
      throw refused('is unknown here: it was made for another mesh or another state folder')
    }
    if (token.expiresMs <= this.nowMs()) {
      throw refused(`has expired at ${new Date(token.expiresMs).toISOString()}`)
    }
    if (token.usesLeft <= 0 && !token.keys.includes(hashOf(key))) {
      throw refused(`was used already, by ${token.keys.length} worker(s), as often as it may be`)
    }
    return token
  }

  #save(): void {
    writePrivate(this.path, JSON.stringify(this.#tokens))
  }
}

function readTokens(path: string): StoredToken[] {
  if (!existsSync(path)) return []
  try {
    return JSON.parse(readFileSync(path, 'utf8')) as StoredToken[]
  } catch {
    return [] // damaged: those tokens are refused, and new ones can be made
  }
}

const hashOf = (bytes: Buffer) => createHash('sha256').update(bytes).digest('hex')

const refused = (reason: string) =>
  new TunemeshError(
    'JOIN_REFUSED',
    `The join token ${reason}. Get another on the coordinator's machine: tunemesh token.`,
  )
