/** The list of hosts that hold a certificate, and of those put out. */
import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type TestContext, test } from 'node:test'
import { JoinedHosts } from '../../coordinator/joined-hosts.js'

function open(t: TestContext) {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-hosts-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const clock = { nowMs: 1_000 }
  const path = join(folder, 'hosts.json')
  const options = { path, certificateLifeMs: 500, nowMs: () => clock.nowMs }
  return { path, clock, reopened: () => new JoinedHosts(options) }
}

test('joined hosts: one that is revoked stays so, and keeps its key on the bus', (t) => {
  const { path, reopened } = open(t)
  const hosts = reopened()
  const { userSeed } = hosts.note({ hostId: 'h-0001aa', host: 'anvil', expiresMs: 2_000 })
  hosts.note({ hostId: 'h-0002bb', host: 'bellows' })
  assert.equal(hosts.revoke('anvil').hostId, 'h-0001aa')
  const again = reopened()
  assert.deepEqual([again.isRevoked('h-0001aa'), again.isRevoked('h-0002bb')], [true, false])
  assert.deepEqual(
    again.revoked.map((host) => [host.userSeed, host.revokedMs]),
    [[userSeed, 1_000]],
  )
  // Neither a renewal nor an attachment under another name takes it back.
  again.note({ hostId: 'h-0001aa', host: 'other', expiresMs: 3_000 })
  assert.equal(reopened().isRevoked('h-0001aa'), true)
  assert.equal(statSync(path).mode & 0o777, 0o600)
})

test('joined hosts: of two with one name the one that is not revoked yet is meant', (t) => {
  const hosts = open(t).reopened()
  for (const hostId of ['h-0001aa', 'h-0002bb']) hosts.note({ hostId, host: 'twin' })
  const code = 'JOB_INVALID'
  assert.throws(() => hosts.revoke('twin'), { code, message: /names 2 hosts: h-0001aa, h-0002bb/ })
  assert.throws(() => hosts.revoke('h-000'), { code, message: /No host "h-000"/ })
  assert.equal(hosts.revoke('h-0002').hostId, 'h-0002bb')
  assert.equal(hosts.revoke('twin').hostId, 'h-0001aa')
})

test('joined hosts: one whose certificates have all expired is forgotten', (t) => {
  const { clock, reopened } = open(t)
  const hosts = reopened()
  hosts.note({ hostId: 'h-0001aa', host: 'anvil', expiresMs: 2_000 })
  hosts.revoke('anvil')
  clock.nowMs = 2_001
  hosts.note({ hostId: 'h-0002bb', host: 'bellows' })
  assert.deepEqual([hosts.revoked, reopened().revoked], [[], []])
})

test('joined hosts: a damaged list is refused, not taken for an empty one', (t) => {
  const { path, reopened } = open(t)
  writeFileSync(path, '[{')
  assert.throws(reopened, { code: 'STATE_CONFLICT', message: /hosts\.json can not be read/ })
})
