import assert from 'node:assert/strict'
import { randomBytes } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, test } from 'node:test'
import { JoinTokens } from '../../coordinator/join-tokens.js'
import { decodeJoinToken, encodeJoinToken } from '../../proto/join-token.js'

const refused = (pattern: RegExp) => ({ code: 'JOIN_REFUSED', message: pattern })

describe('join token, the text', () => {
  const parts = { fingerprint: Buffer.alloc(32, 7), secret: Buffer.alloc(16, 200) }
  const text = encodeJoinToken(parts)

  test('it gives back fingerprint and secret, also with white space around it', () => {
    assert.deepEqual(decodeJoinToken(text), parts)
    assert.deepEqual(decodeJoinToken(` ${text}\n`), parts)
  })

  test('it is one word that no shell changes', () => {
    for (let turn = 0; turn < 100; turn++) {
      const random = { fingerprint: randomBytes(32), secret: randomBytes(16) }
      assert.match(encodeJoinToken(random), /^tmj1_[\w-]{70}$/)
    }
  })

  test('every changed character is noticed, in whatever bits of it', () => {
    const letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_'
    for (const other of letters.replace(text.at(-1) ?? '', '')) {
      const changed = text.slice(0, -1) + other
      assert.throws(() => decodeJoinToken(changed), refused(/missing or changed/), other)
    }
    for (let at = 5; at < text.length; at++) {
      const other = text[at] === 'A' ? 'B' : 'A'
      const changed = text.slice(0, at) + other + text.slice(at + 1)
      assert.throws(() => decodeJoinToken(changed), refused(/missing or changed/), `at ${at}`)
    }
  })

  test('a part of it, more than it, and another text are no tokens', () => {
    assert.throws(() => decodeJoinToken(text.slice(0, -1)), refused(/missing or changed/))
    assert.throws(() => decodeJoinToken(`${text}AAAA`), refused(/missing or changed/))
    assert.throws(() => decodeJoinToken(''), refused(/does not begin with tmj1_/))
    assert.throws(() => decodeJoinToken('secret'), refused(/does not begin with tmj1_/))
  })
})

describe('join token, its use', () => {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  after(() => rmSync(folder, { recursive: true, force: true }))
  let number = 0
  let nowMs = 1_000_000
  const newTokens = (path = join(folder, `${number++}.json`)) => ({
    path,
    tokens: new JoinTokens(path, () => nowMs),
  })
  const [key, otherKey] = [Buffer.from('key'), Buffer.from('other key')]

  test('one use: the second host is refused, the first one may ask again', () => {
    const { tokens } = newTokens()
    const { secret } = tokens.issue({ ttlMs: 1_000, uses: 1 })
    tokens.use(secret, key)
    assert.throws(() => tokens.use(secret, otherKey), refused(/used already/))
    tokens.use(secret, key)
  })

  test('two uses let two hosts in, and no third', () => {
    const { tokens } = newTokens()
    const { secret } = tokens.issue({ ttlMs: 1_000, uses: 2 })
    tokens.use(secret, key)
    tokens.use(secret, otherKey)
    assert.throws(() => tokens.use(secret, Buffer.from('third')), refused(/used already/))
  })

  test('it counts until its last millisecond, and not after', () => {
    const { tokens } = newTokens()
    const { secret, expiresMs } = tokens.issue({ ttlMs: 1_000, uses: 2 })
    nowMs = expiresMs - 1
    tokens.use(secret, key)
    nowMs = expiresMs
    assert.throws(() => tokens.use(secret, key), refused(/has expired/))
  })

  test('a secret that was never given out is refused', () => {
    const { tokens } = newTokens()
    tokens.issue({ ttlMs: 1_000, uses: 1 })
    assert.throws(() => tokens.use(randomBytes(16), key), refused(/unknown here/))
  })

  test('what was used stays used after a restart; the file is private and holds no secret', () => {
    const { path, tokens } = newTokens()
    const { secret } = tokens.issue({ ttlMs: 1_000, uses: 1 })
    const unused = tokens.issue({ ttlMs: 1_000, uses: 1 }).secret
    tokens.use(secret, key)
    assert.equal(statSync(path).mode & 0o777, 0o600)
    const text = readFileSync(path, 'utf8')
    for (const form of ['hex', 'base64', 'base64url'] as const) {
      assert.ok(!text.includes(secret.toString(form)))
    }
    const again = newTokens(path).tokens
    assert.throws(() => again.use(secret, otherKey), refused(/used already/))
    again.use(unused, otherKey)
  })

  test('a damaged file refuses its tokens and takes new ones', () => {
    const { path, tokens } = newTokens()
    const { secret } = tokens.issue({ ttlMs: 1_000, uses: 1 })
    writeFileSync(path, '[{"ha')
    const again = newTokens(path).tokens
    assert.throws(() => again.use(secret, key), refused(/unknown here/))
    again.use(again.issue({ ttlMs: 1_000, uses: 1 }).secret, key)
  })

  test('1,000 are remembered at once, and room comes a week after they expired', () => {
    const { tokens } = newTokens()
    for (let turn = 0; turn < 1_000; turn++) tokens.issue({ ttlMs: 1_000, uses: 1 })
    assert.throws(() => tokens.issue({ ttlMs: 1_000, uses: 1 }), { code: 'STATE_CONFLICT' })
    nowMs += 1_000 + 7 * 24 * 3_600_000
    tokens.issue({ ttlMs: 1_000, uses: 1 })
  })
})
