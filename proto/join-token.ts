/**
 * The token of a join line: whom to trust, and a secret to be trusted by. One line of text without
 * anything that a shell or a chat program changes; a checksum tells a damaged copy from a wrong
 * one.
 */
import { createHash } from 'node:crypto'
import { TunemeshError } from './errors.js'

export interface JoinToken {
  /** SHA-256 of the authority's certificate, 32 bytes. */
  fingerprint: Buffer
  /** 16 random bytes. */
  secret: Buffer
}

const prefix = 'tmj1_'
const fingerprintBytes = 32
export const joinSecretBytes = 16
const checkBytes = 4

export function encodeJoinToken({ fingerprint, secret }: JoinToken): string {
  const body = Buffer.concat([fingerprint, secret])
  return prefix + Buffer.concat([body, checkOf(body)]).toString('base64url')
}

/** @throws TunemeshError JOIN_REFUSED: the text is no token, or not all of one */
export function decodeJoinToken(text: string): JoinToken {
  const trimmed = text.trim()
  if (!trimmed.startsWith(prefix)) throw notToken(`it does not begin with ${prefix}`)
  const written = trimmed.slice(prefix.length)
  const bytes = Buffer.from(written, 'base64url')
  const bodyBytes = fingerprintBytes + joinSecretBytes
  const body = bytes.subarray(0, bodyBytes)
  // Bits of the last character that no byte has would be overlooked otherwise.
  const isWhole = bytes.length === bodyBytes + checkBytes && bytes.toString('base64url') === written
  if (!isWhole || !bytes.subarray(bodyBytes).equals(checkOf(body))) {
    throw notToken('a character is missing or changed')
  }
  return {
    fingerprint: body.subarray(0, fingerprintBytes),
    secret: body.subarray(fingerprintBytes),
  }
}

const checkOf = (body: Buffer) =>
  createHash('sha256').update(prefix).update(body).digest().subarray(0, checkBytes)

const notToken = (reason: string) =>
  new TunemeshError(
    'JOIN_REFUSED',
    `--token is not a join token: ${reason}. Copy the whole join line that \`tunemesh up\` or ` +
      '`tunemesh token` printed.',
  )
