/**
 * What a host keeps of having joined a mesh: the mesh's authority, its own key and certificate, in
 * one file 0600 that all its workers read. Renewed certificates count from the next connection on.
 */
import { createHash, generateKeyPairSync, type KeyObject, randomBytes } from 'node:crypto'
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { type ChannelCredentials, type ChannelOptions, experimental } from '@grpc/grpc-js'
import { z } from 'zod'
import { TunemeshError } from '../proto/errors.js'
import type { Certificate__Output } from '../proto/gen/tunemesh/v1/Certificate.js'
import { channelOptions, JoinService } from '../proto/services.js'
import { certificateRequest, coordinatorTlsName, type TlsIdentity } from '../proto/tls.js'
import { callOnce, type StartUnary } from './rpc.js'

const renewDeadlineMs = 10_000

const storedSchema = z.object({
  /** HOST:PORT by which it joined. */
  address: z.string(),
  hostId: z.string(),
  ca: z.string(),
  certificate: z.string(),
  key: z.string(),
  expiresMs: z.number(),
  renewMs: z.number(),
})
type Stored = z.output<typeof storedSchema>

/** The coordinator's certificate has this name, whatever address leads to it. */
export const tlsChannelOptions: ChannelOptions = {
  ...channelOptions,
  'grpc.ssl_target_name_override': coordinatorTlsName,
}

export class JoinedHost implements TlsIdentity {
  #stored: Stored
  readonly #listeners = new Set<experimental.IdentityCertificateUpdateListener>()

  private constructor(
    readonly path: string,
    stored: Stored,
  ) {
    this.#stored = stored
  }

  static pathFor(stateDir: string, address: string): string {
    const name = address.replace(/[^a-zA-Z0-9.-]/g, '_')
    const tail = createHash('sha256').update(address).digest('hex').slice(0, 8)
    return join(stateDir, 'joined', `${name}.${tail}.json`)
  }

  /** null: it has not joined there, or what it kept is damaged. */
  static read(path: string): JoinedHost | null {
    const stored = readStored(path)
    return stored === null ? null : new JoinedHost(path, stored)
  }

  static keep(path: string, stored: Stored): JoinedHost {
    const host = new JoinedHost(path, stored)
    host.#write(stored)
    return host
  }

  /** Its certificates count no more: the next start joins again. */
  forget(): void {
    rmSync(this.path, { force: true })
  }

  get address(): string {
    return this.#stored.address
  }
  get hostId(): string {
    return this.#stored.hostId
  }
  get ca(): string {
    return this.#stored.ca
  }
  get certificate(): string {
    return this.#stored.certificate
  }
  get key(): string {
    return this.#stored.key
  }

  hasExpired(nowMs: number): boolean {
    return this.#stored.expiresMs <= nowMs
  }

  /** @throws TunemeshError CERTIFICATE_INVALID */
  assertValid(nowMs: number): void {
    if (!this.hasExpired(nowMs)) return
    throw new TunemeshError(
      'CERTIFICATE_INVALID',
      `This host's certificate for ${this.address} has expired at ` +
        `${new Date(this.#stored.expiresMs).toISOString()}. Join again with a new token; ` +
        '`tunemesh token` on the coordinator prints one.',
    )
  }

  /** New connections show the newest certificate, and take no other coordinator's. */
  credentials(): ChannelCredentials {
    const authority = { caCertificate: Buffer.from(this.ca) }
    const provider: experimental.CertificateProvider = {
      addCaCertificateListener: (listener) => process.nextTick(listener, authority),
      removeCaCertificateListener: () => {},
      addIdentityCertificateListener: (listener) => {
        this.#listeners.add(listener)
        process.nextTick(() => this.#tell(listener))
      },
      removeIdentityCertificateListener: (listener) => this.#listeners.delete(listener),
    }
    return experimental.createCertificateProviderChannelCredentials(provider, provider)
  }

  /**
   * Gets the next certificate once a third of this one's life is over; does nothing before, or
   * where another worker of the host has got it meanwhile.
   * @returns whether this call has got one
   */
  async renewIfDue(nowMs: number): Promise<boolean> {
    const newest = readStored(this.path)
    if (newest !== null && newest.expiresMs > this.#stored.expiresMs) this.#take(newest)
    if (nowMs < this.#stored.renewMs) return false
    const service = new JoinService(this.address, this.credentials(), tlsChannelOptions)
    try {
      const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' })
      const request = { certificateRequest: certificateRequest(privateKey) }
      const start: StartUnary<Certificate__Output> = (m, o, done) =>
        service.renew(request, m, o, done)
      const issued = await callOnce(start, { token: '', deadlineMs: renewDeadlineMs })
      const { ca, address } = this.#stored
      this.#write({ ...storedOf(issued), ca, address, key: pemOfKey(privateKey) })
      return true
    } finally {
      service.close()
    }
  }

  #write(stored: Stored): void {
    mkdirSync(dirname(this.path), { recursive: true, mode: 0o700 })
    const temp = `${this.path}.${randomBytes(6).toString('hex')}`
    writeFileSync(temp, `${JSON.stringify(stored, null, 2)}\n`, { mode: 0o600, flag: 'wx' })
    renameSync(temp, this.path)
    this.#take(stored)
  }

  #take(stored: Stored): void {
    this.#stored = stored
    for (const listener of this.#listeners) this.#tell(listener)
  }

  #tell(listener: experimental.IdentityCertificateUpdateListener): void {
    const { certificate, key } = this
    listener({ certificate: Buffer.from(certificate), privateKey: Buffer.from(key) })
  }
}

export const storedOf = ({
  certificatePem,
  hostId,
  expiresMs,
  renewMs,
}: Certificate__Output): Omit<Stored, 'ca' | 'address' | 'key'> => ({
  certificate: certificatePem,
  hostId,
  expiresMs,
  renewMs,
})

export const pemOfKey = (key: KeyObject): string =>
  key.export({ type: 'pkcs8', format: 'pem' }).toString()

function readStored(path: string): Stored | null {
  if (!existsSync(path)) return null
  try {
    return storedSchema.parse(JSON.parse(readFileSync(path, 'utf8')))
  } catch {
    return null // half of it, or another version's: the host joins again
  }
}
