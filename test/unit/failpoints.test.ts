/** proto/PROTOCOL.md §9, the code's names and the kills of npm run chaos are one list. */
import assert from 'node:assert/strict'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { test } from 'node:test'
import type { CommitLogRecord } from '../../proto/commit-record.js'
import { chaosCases } from '../chaos/chaos-cases.js'
import { projectTop } from '../project-top.js'

const kinds: CommitLogRecord['kind'][] = ['epoch', 'commit', 'skip', 'checkpoint', 'rollback']
const eachKind = (name: string) =>
  name.endsWith('<kind>') ? kinds.map((kind) => name.replace('<kind>', kind)) : [name]

function namesInProtocol(): string[] {
  const text = readFileSync(join(projectTop, 'proto/PROTOCOL.md'), 'utf8')
  const table = text.slice(text.indexOf('## 9. Failpoints'))
  return [...table.matchAll(/`((?:worker|coordinator)\.[a-z-]+(?:<kind>)?)`/g)].map(
    ([, name]) => name ?? '',
  )
}

function namesInCode(): string[] {
  const names: string[] = []
  for (const folder of ['worker', 'coordinator']) {
    for (const file of readdirSync(join(projectTop, folder))) {
      if (!file.endsWith('.ts')) continue
      const text = readFileSync(join(projectTop, folder, file), 'utf8')
      for (const [, name = ''] of text.matchAll(/failpoint\(['`]([^'`]+)['`]\)/g)) {
        names.push(name.replace(/\$\{.*\}/, '<kind>'))
      }
    }
  }
  return names
}

test('the protocol lists every failpoint of the code, once, and no other', () => {
  assert.deepEqual(namesInCode().sort(), namesInProtocol().sort())
})

test('npm run chaos kills at every failpoint', () => {
  const tried = new Set(chaosCases.flatMap(({ failpoints }) => failpoints))
  const wanted = namesInProtocol().flatMap(eachKind)
  assert.deepEqual([...tried].sort(), wanted.sort())
})
