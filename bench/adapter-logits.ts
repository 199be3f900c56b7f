/**
 * Logits of a base model with a PEFT adapter, for bench/peers/adapter.py, which compares them with
 * those of transformers and peft: float32 rows into OUT.
 *
 *   adapter-logits.js MODEL ADAPTER "id id id…" OUT [--device cuda:0] [--precision bf16]
 *
 * MODEL is a Hugging Face folder; without an adapter ('') its own logits.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { modelConfigFromJson } from '../proto/model-config.js'
import { openEngine } from '../worker/engine.js'

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    device: { type: 'string', default: 'cpu' },
    precision: { type: 'string', default: 'fp32' },
  },
})
const [modelPath, adapter = '', ids, out] = positionals
if (!modelPath || !ids || !out) {
  throw new Error('Give MODEL, ADAPTER, token ids and the file to write.')
}
const configPath = join(modelPath, 'config.json')
const engine = openEngine({
  modelPath,
  config: modelConfigFromJson(JSON.parse(readFileSync(configPath, 'utf8')), configPath),
  device: values.device,
  precision: values.precision === 'bf16' ? 'bf16' : 'fp32',
  numThreads: 2,
  instructionPath: 'auto',
  packedCacheDir: null,
})
try {
  await engine.load()
  if (adapter !== '') await engine.loadAdapter(adapter)
  const tokens = Int32Array.from(ids.split(' '), Number)
  const logits = await engine.logits({
    tokens,
    targets: new Int32Array(tokens.length).fill(-100),
    documentStarts: Int32Array.of(0, tokens.length),
  })
  writeFileSync(out, new Uint8Array(logits.buffer, logits.byteOffset, logits.byteLength))
} finally {
  await engine.close()
}
