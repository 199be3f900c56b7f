/**
 * The mesh's own certificate authority: one key in the state folder, made at the first `--listen`
 * and kept. It signs the coordinator's server certificate, the hosts that join, and nothing else.
 */
import {
  createHash,
  createPrivateKey,
  generateKeyPairSync,
  type KeyObject,
  X509Certificate,
} from 'node:crypto'
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { distinguishedName, publicKeyDer, type TlsIdentity, workerUnit } from '../proto/tls.js'
import { newCertificate } from './certificate.js'
import { writePrivate } from './state-folder.js'

const dayMs = 24 * 3_600_000
const authorityLifeMs = 3_650 * dayMs
/** Made anew at each start. */
const serverLifeMs = 730 * dayMs
/** A joiner's clock may be behind. */
const backdatedMs = 3_600_000

export interface IssuedCertificate {
  certificate: string
  hostId: string
  expiresMs: number
}

export class CertificateAuthority {
  readonly #key: KeyObject
  /** PEM. */
  readonly certificate: string
  /** SHA-256 of its DER: what join tokens carry. */
  readonly fingerprint: Buffer
  readonly #name = distinguishedName('authority', 'tunemesh')

  private constructor(key: KeyObject, certificate: X509Certificate) {
    this.#key = key
    this.certificate = certificate.toString()
    this.fingerprint = createHash('sha256').update(certificate.raw).digest()
  }

  /**
   * @param folder of the state: `authority.pem` in it holds key and certificate, 0600; `ca.pem` the
   *   certificate alone, for other programs
   * @throws TunemeshError CERTIFICATE_INVALID: the file is damaged, or its certificate has expired
   */
  static open(folder: string, nowMs: number): CertificateAuthority {
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    const path = join(folder, 'authority.pem')
    if (!existsSync(path)) writePrivate(path, newAuthority(nowMs))
    const authority = CertificateAuthority.#read(path, nowMs)
    writePrivate(join(folder, 'ca.pem'), authority.certificate)
    return authority
  }

  static #read(path: string, nowMs: number): CertificateAuthority {
    const text = readFileSync(path, 'utf8')
    try {
      const key = createPrivateKey(text)
      const certificate = new X509Certificate(text)
      if (!certificate.checkPrivateKey(key)) throw new Error('key and certificate differ')
      if (Date.parse(certificate.validTo) < nowMs) {
        throw new Error(`it has expired on ${certificate.validTo}`)
      }
      return new CertificateAuthority(key, certificate)
    } catch (cause) {
      throw new TunemeshError(
        'CERTIFICATE_INVALID',
        `The mesh's authority in ${path} cannot be used: ${(cause as Error).message}. Move the ` +
          'file away: the next start makes another, and each worker has to join again.',
        { cause },
      )
    }
  }

  /** For the coordinator's listeners. @param names DNS names and IP addresses */
  server(names: string[], nowMs: number): TlsIdentity {
    return this.#own('server', { unit: 'coordinator', altNames: names, nowMs })
  }

  /** For a client on the coordinator's own machine: itself, and its workers. */
  local(nowMs: number): TlsIdentity {
    return this.#own('client', { unit: 'local', altNames: [], nowMs })
  }

  /** @param hostId of a certificate that is renewed; else it follows from the key */
  worker(
    publicKey: KeyObject,
    life: { nowMs: number; lifeMs: number },
    hostId = hostIdOf(publicKey),
  ): IssuedCertificate {
    const expiresMs = life.nowMs + life.lifeMs
    const certificate = newCertificate({
      use: 'client',
      subject: distinguishedName(workerUnit, hostId),
      issuer: this.#name,
      publicKey,
      issuerKey: this.#key,
      notBeforeMs: Math.min(life.nowMs, expiresMs) - backdatedMs,
      notAfterMs: expiresMs,
    })
    return { certificate, hostId, expiresMs }
  }

  #own(
    use: 'server' | 'client',
    { unit, altNames, nowMs }: { unit: string; altNames: string[]; nowMs: number },
  ): TlsIdentity {
    const { privateKey, publicKey } = newKeys()
    const certificate = newCertificate({
      use,
      subject: distinguishedName(unit, 'coordinator'),
      issuer: this.#name,
      publicKey,
      issuerKey: this.#key,
      notBeforeMs: nowMs - backdatedMs,
      notAfterMs: nowMs + serverLifeMs,
      altNames,
    })
    return { ca: this.certificate, certificate, key: pemOf(privateKey) }
  }
}

function newAuthority(nowMs: number): string {
  const { privateKey, publicKey } = newKeys()
  const name = distinguishedName('authority', 'tunemesh')
  const certificate = newCertificate({
    use: 'authority',
    subject: name,
    issuer: name,
    publicKey,
    issuerKey: privateKey,
    notBeforeMs: nowMs - backdatedMs,
    notAfterMs: nowMs + authorityLifeMs,
  })
  return pemOf(privateKey) + certificate
}

const newKeys = () => generateKeyPairSync('ec', { namedCurve: 'P-256' })

const pemOf = (key: KeyObject) => key.export({ type: 'pkcs8', format: 'pem' }).toString()

/** The same for the same key, so that a repeated request makes no second host. */
function hostIdOf(key: KeyObject): string {
  const digest = createHash('sha256').update(publicKeyDer(key)).digest('hex')
  return `h-${digest.slice(0, 16)}`
}
