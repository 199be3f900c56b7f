import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { parseRow } from '../../bench/gpu/rows.js'
import { PeerPackages, peerCalls, runPeers } from '../../bench/gpu/torch.js'

const names = (row: string, variants: string[]) =>
  peerCalls(parseRow(row), variants).map((call) => call.join(' '))

test('peers of a row: those that train such a model, and none that do not', () => {
  const all = ['plain', 'compile', 'liger', 'torchtune']
  assert.deepEqual(names('8b-lora-4x2048', all), [
    'trainer_step.py llama-8b lora 4 2048 plain',
    'trainer_step.py llama-8b lora 4 2048 compile',
    'trainer_step.py llama-8b lora 4 2048 liger',
    'torchtune_step.py llama-8b 4 2048',
  ])
  assert.deepEqual(names('3b-full-4x512', ['torchtune']), [])
  assert.deepEqual(names('qwen7b-full-16x1024', ['liger+checkpoint', 'torchtune']), [
    'trainer_step.py qwen2.5-7b full 16 1024 liger+checkpoint',
  ])
  assert.deepEqual(names('5m-full-8x256', all), ['small_step.py tiny-5m full 8 256 bfloat16'])
})

test('peers: the fastest first; one that fails or hangs costs its time only', async (t) => {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-peers-'))
  t.after(() => rmSync(folder, { recursive: true }))
  const bin = join(folder, 'bin')
  mkdirSync(bin)
  // Stands in for python3: the last argument says what becomes of this peer.
  const script = `#!/bin/sh
for last; do :; done
case $last in
  plain) echo 'noise'; echo '{"peer": "plain", "tokens_per_second": 100.5, "peak_gib": 2}' ;;
  liger) echo '{"peer": "liger", "tokens_per_second": 200, "peak_gib": 1}' ;;
  compile) tail -f /dev/null & tail -f /dev/null ;;
  *) echo 'no such package' >&2; exit 1 ;;
esac
`
  writeFileSync(join(bin, 'python3'), script)
  chmodSync(join(bin, 'python3'), 0o755)
  t.mock.method(console, 'log', () => {})
  const told = t.mock.method(console, 'error', () => {})
  const { PATH } = process.env
  t.after(() => {
    process.env.PATH = PATH
  })
  process.env.PATH = `${bin}:${PATH}`
  const packages = new PeerPackages(undefined, { PATH: process.env.PATH })
  const runs = { scriptsDir: '/peers/', packages, limitSeconds: 1 }
  const variants = ['plain', 'compile', 'checkpoint', 'liger']
  const found = await runPeers(runs, parseRow('1b-full-8x2048'), variants)
  assert.deepEqual(found, [
    { peer: 'liger', tokensPerSecond: 200, peakGib: 1 },
    { peer: 'plain', tokensPerSecond: 100.5, peakGib: 2 },
  ])
  const lines = told.mock.calls.map(({ arguments: [line] }) => String(line))
  assert.match(lines[0] ?? '', /compile did not end in 1 s and was stopped/)
  assert.match(lines[1] ?? '', /checkpoint failed after 0 s: no such package/)
})

const hasPython = spawnSync('python3', ['--version']).status === 0
const skip = hasPython ? false : 'no python3 here'

test('wheels: torchtune gets its own, no other peer sees them', { skip }, (t) => {
  const wheelsDir = mkdtempSync(join(tmpdir(), 'tunemesh-wheels-'))
  t.after(() => rmSync(wheelsDir, { recursive: true }))
  // What Python's zipfile takes for an archive without files.
  const empty = Buffer.concat([Buffer.from('PK\x05\x06'), Buffer.alloc(18)])
  for (const name of ['liger_kernel-0.8.5-py3-none-any.whl', 'torchao-0.15.0-py3-none-any.whl'])
    writeFileSync(join(wheelsDir, name), empty)
  const packages = new PeerPackages(wheelsDir, { PYTHONPATH: '/mine' })
  t.after(() => packages.remove())
  const { folder } = packages
  assert.equal(packages.envFor('trainer_step.py').PYTHONPATH, `${folder}/liger:/mine`)
  assert.equal(packages.envFor('torchtune_step.py').PYTHONPATH, `${folder}/torchtune:/mine`)
})

test('wheels: a folder without any is named', () => {
  assert.throws(() => new PeerPackages('/nonexistent', {}), /--wheels \/nonexistent has no file/)
  const none = new PeerPackages(undefined, { PYTHONPATH: '/mine' })
  assert.equal(none.envFor('torchtune_step.py').PYTHONPATH, '/mine')
})
