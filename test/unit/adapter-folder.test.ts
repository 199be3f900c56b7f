import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { test } from 'node:test'
import { floats, readTensors } from '../golden-run/safetensors.js'
import { goldenBatch, goldenEngine, goldenFolder, goldenLora } from './engine-fixture.js'

const family = 'llama-tied'
const peftFolder = join(goldenFolder(family), 'adapter')
const configOf = (folder: string) =>
  JSON.parse(readFileSync(join(folder, 'adapter_config.json'), 'utf8')) as Record<string, unknown>

test('adapter: written as PEFT writes it, and it loads back to the same logits', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  const trained = await goldenEngine(family)
  const loaded = await goldenEngine(family)
  const untuned = await goldenEngine(family)
  try {
    await trained.prepare(goldenLora)
    await trained.loadAdapter(peftFolder)
    await trained.writeAdapter(folder, 'some/base')

    const { target_modules: wantedModules, ...wanted } = configOf(peftFolder)
    const { target_modules: modules, ...found } = configOf(folder)
    assert.deepEqual([...(modules as string[])].sort(), [...(wantedModules as string[])].sort())
    assert.equal(found.base_model_name_or_path, 'some/base')
    for (const key of ['peft_type', 'task_type', 'r', 'lora_alpha', 'bias', 'use_rslora']) {
      assert.equal(found[key], wanted[key], key)
    }
    for (const key of ['fan_in_fan_out', 'inference_mode', 'use_dora', 'modules_to_save']) {
      assert.equal(found[key], wanted[key], key)
    }

    const peft = readTensors(join(peftFolder, 'adapter_model.safetensors'))
    const ours = readTensors(join(folder, 'adapter_model.safetensors'))
    assert.deepEqual([...ours.keys()].sort(), [...peft.keys()].sort())
    for (const [name, tensor] of peft) {
      assert.deepEqual(ours.get(name)?.shape, tensor.shape, name)
      assert.deepEqual(floats(ours, name), floats(peft, name), name)
    }

    await loaded.loadAdapter(folder)
    const batch = goldenBatch(family, 0)
    const logits = await loaded.logits(batch)
    assert.deepEqual(logits, await trained.logits(batch))
    assert.notDeepEqual(logits, await untuned.logits(batch))
  } finally {
    for (const engine of [trained, loaded, untuned]) await engine.close()
    rmSync(folder, { recursive: true, force: true })
  }
})
