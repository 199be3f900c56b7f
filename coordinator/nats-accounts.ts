/**
 * Who may do what on the bus: an operator key signs two accounts, an account's key signs users.
 * The server knows the two signatures' public side only; a user is made without telling it.
 */
import {
  createAccount,
  createOperator,
  createUser,
  encodeAccount,
  encodeOperator,
  encodeUser,
  fromSeed,
} from 'nats-jwt'
import type { NatsCredentials } from '../proto/nats-client.js'
import { workerPermissions } from '../proto/subjects.js'

/** Seeds: what signs. They stay in a file 0600 of the coordinator's state folder. */
export interface NatsSeeds {
  operator: string
  mesh: string
  system: string
}

/** How long a worker's credentials count; renewed at half of it. */
export const workerLifeMs = 24 * 3_600_000

const noLimit = -1
const revokedAheadSeconds = 3_600

/** A key for all workers of a host. */
export const newUserSeed = (): string => seedOf(createUser())

export function newSeeds(): NatsSeeds {
  return {
    operator: seedOf(createOperator()),
    mesh: seedOf(createAccount()),
    system: seedOf(createAccount()),
  }
}

/** What an account's store is named. */
export const accountName = (seed: string): string => keyOf(seed).getPublicKey()

const limits = {
  subs: noLimit,
  data: noLimit,
  payload: noLimit,
  imports: noLimit,
  exports: noLimit,
  wildcards: true,
  conn: noLimit,
  leaf: 0,
}

/** Signed by the operator. @param revokedSeeds of users whose credentials count no more */
export function meshAccount(seeds: NatsSeeds, revokedSeeds: readonly string[]): Promise<string> {
  const storage = {
    mem_storage: noLimit,
    disk_storage: noLimit,
    streams: noLimit,
    consumer: noLimit,
  }
  // What was signed until then; no such user is signed for again, so that no clock matters.
  const untilSeconds = Math.floor(Date.now() / 1000) + revokedAheadSeconds
  const revocations = Object.fromEntries(
    revokedSeeds.map((seed) => [keyOf(seed).getPublicKey(), untilSeconds]),
  )
  const account = { limits: { ...limits, ...storage }, revocations }
  return encodeAccount('MESH', keyOf(seeds.mesh), account, { signer: keyOf(seeds.operator) })
}

/** The part of nats-server's configuration that says whom it trusts; nothing in it is secret. */
export async function trustConfig(
  seeds: NatsSeeds,
  revokedSeeds: readonly string[],
): Promise<string> {
  const operator = keyOf(seeds.operator)
  const mesh = keyOf(seeds.mesh)
  const system = keyOf(seeds.system)
  const signer = { signer: operator }
  const meshJwt = await meshAccount(seeds, revokedSeeds)
  const systemJwt = await encodeAccount('SYS', system, { limits }, signer)
  return `operator: ${await encodeOperator('tunemesh', operator)}
system_account: ${system.getPublicKey()}
resolver: MEMORY
resolver_preload: {
  ${mesh.getPublicKey()}: ${meshJwt}
  ${system.getPublicKey()}: ${systemJwt}
}
`
}

/** Of this process itself: made anew at each start, kept in memory only. */
export const coordinatorUser = (seeds: NatsSeeds): Promise<NatsCredentials> =>
  newUser('coordinator', seeds.mesh, {})

export const systemUser = (seeds: NatsSeeds): Promise<NatsCredentials> =>
  newUser('system', seeds.system, {})

/**
 * Limited to the worker's own subjects.
 * @param expiresMs of the wall clock
 * @param userSeed the key of its host, which may be revoked; null: one of its own
 */
export function workerUser(
  seeds: NatsSeeds,
  workerId: string,
  { expiresMs, userSeed }: { expiresMs: number; userSeed: string | null },
): Promise<NatsCredentials> {
  const { publish, subscribe } = workerPermissions(workerId)
  const permissions = {
    pub: { allow: publish, deny: [] },
    sub: { allow: subscribe, deny: [] },
  }
  return newUser(workerId, seeds.mesh, { permissions, expiresMs, userSeed })
}

async function newUser(
  name: string,
  accountSeed: string,
  limits: {
    permissions?: Parameters<typeof encodeUser>[3]
    expiresMs?: number
    userSeed?: string | null
  },
): Promise<NatsCredentials> {
  const user = limits.userSeed ? keyOf(limits.userSeed) : createUser()
  const { permissions = {}, expiresMs } = limits
  const validity = expiresMs === undefined ? {} : { exp: Math.ceil(expiresMs / 1000) }
  const jwt = await encodeUser(name, user, keyOf(accountSeed), permissions, validity)
  return { jwt, seed: seedOf(user) }
}

type KeyPair = ReturnType<typeof createUser>

const seedOf = (key: KeyPair): string => new TextDecoder().decode(key.getSeed())
const keyOf = (seed: string): KeyPair => fromSeed(new TextEncoder().encode(seed))
