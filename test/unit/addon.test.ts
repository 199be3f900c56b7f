/** The addon's stamp: one built from other sources is refused by name. */
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import { pathToFileURL } from 'node:url'
import { assertInterface } from '../../worker/addon.js'
import { addonInterface } from '../../worker/addon-interface.js'
import { projectTop } from '../project-top.js'

test('addon: both sides have the stamp that follows from native/bindings', async () => {
  const script = pathToFileURL(join(projectTop, 'scripts/addon-interface.mjs')).href
  const { interfaceStamp, stampedFiles } = (await import(script)) as {
    interfaceStamp(): string
    stampedFiles(stamp: string): Record<string, string>
  }
  for (const [path, expected] of Object.entries(stampedFiles(interfaceStamp()))) {
    const told = `run: node scripts/addon-interface.mjs, for ${path}`
    assert.equal(readFileSync(join(projectTop, path), 'utf8'), expected, told)
  }
})

test('addon: another stamp, or none as before there was one, is refused by name', () => {
  assertInterface(addonInterface, 'here')
  const seen = (stamp: unknown) => () => assertInterface(stamp, 'build/native/tunemesh.node')
  const code = 'ENGINE_OUTDATED'
  assert.throws(seen('0123456789ab'), {
    code,
    message: /tunemesh\.node has interface 0123456789ab/,
  })
  assert.throws(seen(undefined), { code, message: /no interface stamp.*Run: npm run build/ })
})
