/** What both ends of a mesh's TLS connection know: names in certificates, how a request looks. */
import { createHash, createPublicKey, type KeyObject, sign, verify } from 'node:crypto'
import { isIP } from 'node:net'
import { bitString, der, explicit, integer, oid, readDer, sequence, tags } from './der.js'

/** PEM texts of one end: its authority, its certificate, its key. */
export interface TlsIdentity {
  ca: string
  certificate: string
  key: string
}

/**
 * In the coordinator's certificate, whatever address it listens on. Workers check this name and not
 * the one they dialled: the authority signs no other server, and addresses differ behind NAT.
 */
export const coordinatorTlsName = 'coordinator.tunemesh.internal'

/** Organisational unit of a worker host's certificate; its common name is the host's identity. */
export const workerUnit = 'worker'

const oids = {
  commonName: '2.5.4.3',
  organization: '2.5.4.10',
  unit: '2.5.4.11',
  ecdsaWithSha256: '1.2.840.10045.4.3.2',
}

export const signatureAlgorithm = sequence(oid(oids.ecdsaWithSha256))

/** X.501 name: organisation `tunemesh`, a unit, a common name. */
export function distinguishedName(unit: string, commonName: string): Buffer {
  const part = (type: string, text: string) =>
    der(tags.set, sequence(oid(type), der(tags.utf8String, Buffer.from(text))))
  return sequence(
    part(oids.organization, 'tunemesh'),
    part(oids.unit, unit),
    part(oids.commonName, commonName),
  )
}

/** DER of what is signed, the algorithm and the signature: certificates and requests alike. */
export function signed(content: Buffer, key: KeyObject): Buffer {
  return sequence(content, signatureAlgorithm, bitString(sign('sha256', content, key)))
}

/** SubjectPublicKeyInfo, DER; of a private key, that of its public half. */
export const publicKeyDer = (key: KeyObject): Buffer =>
  (key.type === 'private' ? createPublicKey(key) : key).export({ type: 'spki', format: 'der' })

/**
 * PKCS #10 request (RFC 2986) of the key's owner, DER. It names nobody: the coordinator decides who
 * the holder of a token is.
 */
export function certificateRequest(key: KeyObject): Buffer {
  const name = distinguishedName(workerUnit, 'request')
  const version = integer(Buffer.from([0]))
  return signed(sequence(version, name, publicKeyDer(key), der(explicit(0))), key)
}

/**
 * The public key of a request that its own key has signed; null: it is none, or of another kind
 * than ECDSA P-256.
 */
export function requestedKey(request: Buffer): KeyObject | null {
  try {
    const [outer, ...behind] = readDer(request)
    if (outer?.tag !== tags.sequence || behind.length > 0) return null
    const [content, , signature] = readDer(outer.content)
    if (content === undefined) return null
    const spki = readDer(content.content)[2]
    if (spki === undefined || signature?.tag !== tags.bitString) return null
    const key = createPublicKey({ key: spki.whole, format: 'der', type: 'spki' })
    if (key.asymmetricKeyDetails?.namedCurve !== 'prime256v1') return null
    return verify('sha256', content.whole, key, signature.content.subarray(1)) ? key : null
  } catch {
    return null // not DER, or no key
  }
}

export function certificatePem(bytes: Buffer): string {
  const lines = bytes.toString('base64').match(/.{1,64}/g) ?? []
  return `-----BEGIN CERTIFICATE-----\n${lines.join('\n')}\n-----END CERTIFICATE-----\n`
}

/** A host as it stands before `:PORT`. */
export const inAddress = (host: string): string => (isIP(host) === 6 ? `[${host}]` : host)

/** SHA-256 of a certificate's DER. */
export const fingerprintOf = (certificate: Buffer): Buffer =>
  createHash('sha256').update(certificate).digest()
