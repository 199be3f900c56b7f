/**
 * Worker hosts that hold a certificate of this mesh, and those put out: a file 0600. A host is
 * known by the identity in its certificate, which a renewed one has too; joining anew gives
 * another.
 */
import { existsSync, readFileSync } from 'node:fs'
import { z } from 'zod'
import { TunemeshError } from '../proto/errors.js'
import { newUserSeed } from './nats-accounts.js'
import { writePrivate } from './state-folder.js'

const maxHosts = 10_000
/** Fewer characters of an identity name no host. */
const shortestId = 6

const storedSchema = z.array(
  z.object({
    hostId: z.string(),
    /** As it named itself when it joined. */
    host: z.string(),
    /** Of its newest certificate: later nothing has to be known of it. */
    expiresMs: z.number(),
    /** Its workers' key on the bus: what is revoked there. */
    userSeed: z.string(),
    revokedMs: z.number().nullable(),
  }),
)
export type KnownHost = z.output<typeof storedSchema>[number]

export interface JoinedHostsOptions {
  path: string
  /** How long a certificate counts at most. */
  certificateLifeMs: number
  /** Wall clock. */
  nowMs: () => number
}

export class JoinedHosts {
  #hosts: Map<string, KnownHost>

  /** @throws TunemeshError STATE_CONFLICT: damaged; whom it puts out must not be forgotten */
  constructor(private readonly options: JoinedHostsOptions) {
    this.#hosts = new Map(readHosts(options.path).map((host) => [host.hostId, host]))
  }

  get revoked(): KnownHost[] {
    return [...this.#hosts.values()].filter(({ revokedMs }) => revokedMs !== null)
  }

  isRevoked(hostId: string): boolean {
    return (this.#hosts.get(hostId)?.revokedMs ?? null) !== null
  }

  /**
   * A host that holds a certificate. Durable when it returns.
   * @throws TunemeshError STATE_CONFLICT: too many
   */
  note(seen: { hostId: string; host: string; expiresMs?: number }): KnownHost {
    const { nowMs, certificateLifeMs } = this.options
    const known = this.#hosts.get(seen.hostId)
    const expiresMs = seen.expiresMs ?? known?.expiresMs ?? nowMs() + certificateLifeMs
    const host = seen.host || (known?.host ?? '')
    if (known?.expiresMs === expiresMs && known.host === host) return known
    this.#forgetExpired()
    if (known === undefined && this.#hosts.size >= maxHosts) throw tooMany()
    const { userSeed = newUserSeed(), revokedMs = null } = known ?? {}
    const noted = { hostId: seen.hostId, host, expiresMs, userSeed, revokedMs }
    this.#hosts.set(noted.hostId, noted)
    this.#save()
    return noted
  }

  /**
   * Durable when it returns; once more is no mistake.
   * @param name a host's name, its identity or the start of it
   * @throws TunemeshError JOB_INVALID: no host, or several
   */
  revoke(name: string): KnownHost {
    const named = [...this.#hosts.values()].filter(
      ({ hostId, host }) => host === name || (name.length >= shortestId && hostId.startsWith(name)),
    )
    const still = named.filter(({ revokedMs }) => revokedMs === null)
    const [found, ...others] = still.length > 0 ? still : named.slice(0, 1)
    if (found === undefined) throw unknown(name)
    if (others.length > 0) throw several(name, still)
    found.revokedMs ??= this.options.nowMs()
    this.#save()
    return found
  }

  #forgetExpired(): void {
    const now = this.options.nowMs()
    for (const { hostId, expiresMs } of this.#hosts.values()) {
      if (expiresMs < now) this.#hosts.delete(hostId)
    }
  }

  #save(): void {
    writePrivate(this.options.path, JSON.stringify([...this.#hosts.values()]))
  }
}

function readHosts(path: string): KnownHost[] {
  if (!existsSync(path)) return []
  try {
    return storedSchema.parse(JSON.parse(readFileSync(path, 'utf8')))
  } catch (cause) {
    throw new TunemeshError(
      'STATE_CONFLICT',
      `The list of joined and revoked hosts in ${path} can not be read. Restore it, or move the ` +
        'whole folder away: that makes another authority, and each host has to join again.',
      { cause },
    )
  }
}

export const hostRevoked = (hostId: string) =>
  new TunemeshError(
    'HOST_REVOKED',
    `This host's certificate (${hostId}) was revoked. With a new token it joins under another ` +
      "one: `tunemesh token` on the coordinator's machine prints the line.",
  )

const unknown = (name: string) =>
  new TunemeshError(
    'JOB_INVALID',
    `No host "${name}" has joined this mesh. \`tunemesh fleet\` lists names and identities; at ` +
      `least ${shortestId} characters of an identity are needed.`,
  )

const several = (name: string, hosts: KnownHost[]) =>
  new TunemeshError(
    'JOB_INVALID',
    `"${name}" names ${hosts.length} hosts: ${hosts.map(({ hostId }) => hostId).join(', ')}. ` +
      'Revoke each by its identity.',
  )

const tooMany = () =>
  new TunemeshError(
    'STATE_CONFLICT',
    `${maxHosts} hosts hold certificates of this mesh, which is the limit; one that has expired ` +
      'is forgotten.',
  )
