import assert from 'node:assert/strict'
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
  const env = { PATH: process.env.PATH }
  const runs = { scriptsDir: '/peers/', env, limitSeconds: 1 }
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

test('wheels: a folder without any is named', () => {
  assert.throws(() => new PeerPackages('/nonexistent', {}), /--wheels \/nonexistent has no file/)
  assert.equal(new PeerPackages(undefined, { PYTHONPATH: '/mine' }).env.PYTHONPATH, '/mine')
})
