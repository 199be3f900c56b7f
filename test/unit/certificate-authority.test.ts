/** Certificates as OpenSSL sees them, through node: what an authority signs and what it refuses. */
import assert from 'node:assert/strict'
import { generateKeyPairSync, X509Certificate } from 'node:crypto'
import { once } from 'node:events'
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, test } from 'node:test'
import tls from 'node:tls'
import { WorkerProofs } from '../../coordinator/access.js'
import { CertificateAuthority } from '../../coordinator/certificate-authority.js'
import { parseListenAddress, serverNames } from '../../coordinator/listen-address.js'
import { readDer } from '../../proto/der.js'
import {
  certificateRequest,
  coordinatorTlsName,
  fingerprintOf,
  publicKeyDer,
  requestedKey,
  type TlsIdentity,
} from '../../proto/tls.js'

const folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
after(() => rmSync(folder, { recursive: true, force: true }))
let number = 0
const newFolder = () => join(folder, String(number++))
const newAuthority = () => CertificateAuthority.open(newFolder(), Date.now())
const newKeys = () => generateKeyPairSync('ec', { namedCurve: 'P-256' })
const dayMs = 24 * 3_600_000

/** A worker's certificate and key. */
function workerOf(authority: CertificateAuthority, lifeMs = dayMs): TlsIdentity {
  const { privateKey, publicKey } = newKeys()
  const { certificate } = authority.worker(publicKey, { nowMs: Date.now(), lifeMs })
  const key = privateKey.export({ type: 'pkcs8', format: 'pem' }).toString()
  return { ca: authority.certificate, certificate, key }
}

interface Handshake {
  /** Of the server, by the client. */
  trusts: boolean
  /** Of the client, by the server: a server that requires no certificate still judges it. */
  authorized: boolean
  subject: string
}

async function handshake(server: TlsIdentity, client: Partial<TlsIdentity>): Promise<Handshake> {
  const listener = tls.createServer({
    ca: server.ca,
    cert: server.certificate,
    key: server.key,
    requestCert: true,
    rejectUnauthorized: false,
    minVersion: 'TLSv1.3',
  })
  listener.listen(0, '127.0.0.1')
  await once(listener, 'listening')
  const accepted = once(listener, 'secureConnection') as Promise<[tls.TLSSocket]>
  const socket = tls.connect({
    port: (listener.address() as AddressInfo).port,
    host: '127.0.0.1',
    servername: coordinatorTlsName,
    ca: client.ca,
    cert: client.certificate,
    key: client.key,
    rejectUnauthorized: false,
  })
  const [served] = await accepted
  if (!socket.authorized && socket.authorizationError === undefined) {
    await once(socket, 'secureConnect')
  }
  const subject = served.getPeerCertificate().subject as { CN?: string } | undefined
  const seen = { trusts: socket.authorized, authorized: served.authorized, subject: '' }
  if (subject?.CN !== undefined) seen.subject = subject.CN
  socket.destroy()
  listener.close()
  return seen
}

describe('certificate authority', () => {
  test('it is made once, kept in a private file, and found again', () => {
    const path = newFolder()
    const first = CertificateAuthority.open(path, Date.now())
    const again = CertificateAuthority.open(path, Date.now())
    assert.deepEqual(again.fingerprint, first.fingerprint)
    assert.equal(statSync(join(path, 'authority.pem')).mode & 0o777, 0o600)
    assert.equal(statSync(path).mode & 0o777, 0o700)
    const alone = readFileSync(join(path, 'ca.pem'), 'utf8')
    assert.doesNotMatch(alone, /PRIVATE/)
    assert.deepEqual(fingerprintOf(new X509Certificate(alone).raw), first.fingerprint)
    assert.notDeepEqual(newAuthority().fingerprint, first.fingerprint)
  })

  test('a damaged or expired one is named, and not replaced', () => {
    const path = newFolder()
    CertificateAuthority.open(path, Date.now())
    const later = Date.now() + 3_651 * dayMs
    const expired = { code: 'CERTIFICATE_INVALID', message: /has expired/ }
    assert.throws(() => CertificateAuthority.open(path, later), expired)
    const file = join(path, 'authority.pem')
    writeFileSync(file, readFileSync(file, 'utf8').slice(0, 300))
    const damaged = { code: 'CERTIFICATE_INVALID', message: /Move the file away/ }
    assert.throws(() => CertificateAuthority.open(path, Date.now()), damaged)
  })

  test('server and worker trust each other', async () => {
    const authority = newAuthority()
    const server = authority.server(serverNames('127.0.0.1', 'here'), Date.now())
    const client = workerOf(authority)
    const { trusts, authorized, subject } = await handshake(server, client)
    assert.deepEqual([trusts, authorized], [true, true])
    assert.match(subject, /^h-[0-9a-f]{16}$/)
  })

  test('a server of another authority, or by a worker certificate, is not trusted', async () => {
    const authority = newAuthority()
    const server = newAuthority().server([coordinatorTlsName], Date.now())
    assert.equal((await handshake(server, workerOf(authority))).trusts, false)
    assert.equal((await handshake(workerOf(authority), workerOf(authority))).trusts, false)
  })

  test('a foreign, an expired, a server and no certificate do not count as a worker', async () => {
    const authority = newAuthority()
    const server = authority.server([coordinatorTlsName], Date.now())
    const { ca } = server
    const others = {
      foreign: { ...workerOf(newAuthority()), ca },
      expired: workerOf(authority, -1_000),
      server,
      none: { ca },
    }
    for (const [kind, client] of Object.entries(others)) {
      const { trusts, authorized } = await handshake(server, client)
      assert.deepEqual([kind, trusts, authorized], [kind, true, false])
    }
  })

  test('a certificate has the addresses it is reached by, IPv6 too', () => {
    const names = ['fe80::1:2', '10.1.2.3', 'host.example', '::1']
    const { certificate } = newAuthority().server(names, Date.now())
    const parsed = new X509Certificate(certificate)
    assert.equal(parsed.checkIP('10.1.2.3'), '10.1.2.3')
    assert.equal(parsed.checkIP('fe80::1:2'), 'fe80::1:2')
    assert.equal(parsed.checkIP('::1'), '::1')
    assert.equal(parsed.checkHost('host.example'), 'host.example')
    assert.equal(parsed.checkHost('other.example'), undefined)
  })

  test('dates beyond 2049 are written so that they are read', () => {
    const { publicKey } = newKeys()
    const nowMs = Date.UTC(2049, 11, 31)
    const authority = CertificateAuthority.open(newFolder(), Date.UTC(2045, 0, 1))
    const { certificate } = authority.worker(publicKey, { nowMs, lifeMs: 30 * dayMs })
    const { validFrom, validTo } = new X509Certificate(certificate)
    assert.match(validFrom, /2049 GMT/)
    assert.equal(Date.parse(validTo), Date.UTC(2050, 0, 30))
  })
})

describe('certificate request', () => {
  test('it gives its key', () => {
    const { privateKey, publicKey } = newKeys()
    const key = requestedKey(certificateRequest(privateKey))
    assert.deepEqual(key && publicKeyDer(key), publicKeyDer(publicKey))
  })

  test('any changed byte makes it none', () => {
    const request = certificateRequest(newKeys().privateKey)
    for (let at = 0; at < request.length; at++) {
      const changed = Buffer.from(request)
      changed[at] = (changed[at] ?? 0) ^ 1
      const key = requestedKey(changed)
      // What is not signed is the name of the signature's algorithm; ours alone is used.
      if (key !== null) assert.ok(isInAlgorithm(request, at), `byte ${at} of ${request.length}`)
    }
  })

  test('a part of it, another curve and what is no DER are none', () => {
    const request = certificateRequest(newKeys().privateKey)
    for (const length of [0, 1, 2, 50, request.length - 1]) {
      assert.equal(requestedKey(request.subarray(0, length)), null)
    }
    assert.equal(requestedKey(Buffer.concat([request, Buffer.from([0])])), null)
    const p384 = generateKeyPairSync('ec', { namedCurve: 'P-384' })
    assert.equal(requestedKey(certificateRequest(p384.privateKey)), null)
    assert.equal(requestedKey(Buffer.alloc(4_096, 0x30)), null)
  })
})

function isInAlgorithm(request: Buffer, at: number): boolean {
  const [outer] = readDer(request)
  const [content, algorithm] = readDer(outer?.content ?? Buffer.alloc(0))
  const start = request.length - (outer?.content.length ?? 0) + (content?.whole.length ?? 0)
  // The byte behind it and its length counts the unused bits of the signature, which are none.
  return at >= start && at < start + (algorithm?.whole.length ?? 0) + 3
}

describe('DER', () => {
  test('lengths that lie beyond the end are refused', () => {
    for (const bytes of [
      [0x30],
      [0x30, 2, 0],
      [0x30, 0x81],
      [0x30, 0x80],
      [0x30, 0x84, 0, 0, 0, 0],
    ]) {
      assert.throws(() => readDer(Buffer.from(bytes)), RangeError)
    }
  })
})

describe('the address to listen on', () => {
  test('host, host and port, and IPv6 are read', () => {
    assert.deepEqual(parseListenAddress('0.0.0.0'), { host: '0.0.0.0', port: 8472 })
    assert.deepEqual(parseListenAddress('10.0.0.5:9000'), { host: '10.0.0.5', port: 9000 })
    assert.deepEqual(parseListenAddress('lan.example:0'), { host: 'lan.example', port: 0 })
    assert.deepEqual(parseListenAddress('::'), { host: '::', port: 8472 })
    assert.deepEqual(parseListenAddress('[fd00::1]:9000'), { host: 'fd00::1', port: 9000 })
  })

  test('what is none is refused, and so is the last port, which has no next one', () => {
    for (const text of ['', ':80', 'a:b', 'host:65535', '[host]:1', 'https://host', 'a b:1:2']) {
      assert.throws(() => parseListenAddress(text), { code: 'JOB_INVALID' }, text)
    }
  })

  test('an open one has names of this machine in its certificate, and of loopback', () => {
    const names = serverNames('0.0.0.0', 'this-host')
    for (const name of [coordinatorTlsName, 'this-host', 'localhost', '127.0.0.1', '::1']) {
      assert.ok(names.includes(name), name)
    }
    assert.equal(names.includes('0.0.0.0'), false)
  })
})

test('proof of a worker id: it counts for that id, on that host, in that mesh', () => {
  const proofs = new WorkerProofs('secret')
  const proof = proofs.proofOf('w-abcde', 'h-1')
  assert.equal(proofs.isProof(proof, 'w-abcde', 'h-1'), true)
  assert.equal(new WorkerProofs('secret').isProof(proof, 'w-abcde', 'h-1'), true)
  assert.equal(proofs.isProof(proof, 'w-other', 'h-1'), false)
  assert.equal(proofs.isProof(proof, 'w-abcde', 'h-2'), false)
  assert.equal(proofs.isProof(proof, 'w-abcde', ''), false)
  assert.equal(proofs.isProof('', 'w-abcde', 'h-1'), false)
  assert.equal(new WorkerProofs('other').isProof(proof, 'w-abcde', 'h-1'), false)
})
