/** Writes X.509 certificates (RFC 5280), ECDSA P-256: what an authority signs, and itself. */
import { createHash, type KeyObject, randomBytes } from 'node:crypto'
import { isIP, SocketAddress } from 'node:net'
import { bitString, der, explicit, implicit, integer, oid, sequence, tags } from '../proto/der.js'
import { certificatePem, publicKeyDer, signatureAlgorithm, signed } from '../proto/tls.js'

export interface CertificateFacts {
  /** Distinguished names, DER. */
  subject: Buffer
  issuer: Buffer
  publicKey: KeyObject
  /** Of the issuer: it signs. */
  issuerKey: KeyObject
  notBeforeMs: number
  notAfterMs: number
  use: 'authority' | 'server' | 'client'
  /** DNS names and IP addresses by which a server is reached. */
  altNames?: string[]
}

const extensionIds = {
  subjectKeyId: '2.5.29.14',
  keyUsage: '2.5.29.15',
  altNames: '2.5.29.17',
  basicConstraints: '2.5.29.19',
  authorityKeyId: '2.5.29.35',
  extendedKeyUsage: '2.5.29.37',
}
const uses = { server: '1.3.6.1.5.5.7.3.1', client: '1.3.6.1.5.5.7.3.2' }
const isTrue = der(tags.boolean, Buffer.from([0xff]))
/** First bit: digitalSignature; sixth and seventh: keyCertSign and cRLSign. */
const signsData = bitString(Buffer.from([0x80]), 7)
const signsCertificates = bitString(Buffer.from([0x06]), 1)

/** PEM. */
export function newCertificate(facts: CertificateFacts): string {
  const { subject, issuer, publicKey, issuerKey, notBeforeMs, notAfterMs } = facts
  const content = sequence(
    der(explicit(0), integer(Buffer.from([2]))), // version 3
    integer(newSerial()),
    signatureAlgorithm,
    issuer,
    sequence(time(notBeforeMs), time(notAfterMs)),
    subject,
    publicKeyDer(publicKey),
    der(explicit(3), sequence(...extensionsOf(facts))),
  )
  return certificatePem(signed(content, issuerKey))
}

function extensionsOf({ use, publicKey, issuerKey, altNames = [] }: CertificateFacts): Buffer[] {
  const isAuthority = use === 'authority'
  const own = der(tags.octetString, keyId(publicKey))
  const extensions = [
    extension('basicConstraints', isAuthority ? authorityOfLeaves() : sequence(), true),
    extension('keyUsage', isAuthority ? signsCertificates : signsData, true),
    extension('subjectKeyId', own),
    extension('authorityKeyId', sequence(der(implicit(0), keyId(issuerKey)))),
  ]
  if (!isAuthority) extensions.push(extension('extendedKeyUsage', sequence(oid(uses[use]))))
  if (altNames.length > 0) extensions.push(extension('altNames', sequence(...altNames.map(name))))
  return extensions
}

function extension(id: keyof typeof extensionIds, value: Buffer, isCritical = false): Buffer {
  const parts = isCritical ? [isTrue] : []
  return sequence(oid(extensionIds[id]), ...parts, der(tags.octetString, value))
}

/** It may sign certificates of ends, not of further authorities. */
const authorityOfLeaves = () => sequence(isTrue, integer(Buffer.from([0])))

const keyId = (key: KeyObject) =>
  createHash('sha256').update(publicKeyDer(key)).digest().subarray(0, 20)

/** 127 random bits: never negative, at most 20 bytes. */
function newSerial(): Buffer {
  const bytes = randomBytes(16)
  bytes[0] = (bytes[0] ?? 0) & 0x7f
  return bytes
}

/** UTCTime through 2049, GeneralizedTime from then on. */
function time(ms: number): Buffer {
  const text = `${new Date(ms).toISOString().replace(/[-:T]/g, '').slice(0, 14)}Z`
  const isUtc = Number(text.slice(0, 4)) < 2050
  const tag = isUtc ? tags.utcTime : tags.generalizedTime
  return der(tag, Buffer.from(isUtc ? text.slice(2) : text))
}

function name(text: string): Buffer {
  const family = isIP(text)
  if (family === 0) return der(implicit(2), Buffer.from(text))
  return der(implicit(7), family === 4 ? octetsOf4(text) : octetsOf6(text))
}

const octetsOf4 = (address: string) => Buffer.from(address.split('.').map(Number))

function octetsOf6(address: string): Buffer {
  const plain = new SocketAddress({ address, family: 'ipv6' }).address
  const [head = '', tail = ''] = plain.split('::')
  const groups = (part: string) => part.split(':').filter((group) => group !== '')
  const [front, back] = [groups(head), groups(tail)]
  const zeros = Array.from({ length: 8 - front.length - back.length }, () => '0')
  const words = [...front, ...zeros, ...back].map((group) => Number.parseInt(group, 16))
  return Buffer.from(words.flatMap((word) => [word >> 8, word & 0xff]))
}
