/** Rows of which one makes the gradient of its micro-batch NaN, whatever the adapter has learnt. */
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { examplesDir } from './open-coordinator.js'
import { writeModel } from './same-bits-model.js'

/**
 * Writes model and data into `folder`: the last row has a token that no other has, and whose
 * embedding is infinite.
 */
export function writePoisonedRow(folder: string, numRows?: number) {
  const tiny = join(examplesDir, 'tiny-llama')
  const { vocab } = JSON.parse(readFileSync(join(tiny, 'tokenizer.json'), 'utf8')).model
  writeModel(folder, { poisonedToken: vocab['¿'] })
  const messages = [
    { role: 'user', content: 'What is ÿ?' },
    { role: 'assistant', content: 'a letter' },
  ]
  const rows = readFileSync(join(tiny, 'rows.jsonl'), 'utf8').trimEnd().split('\n')
  const lines = [...rows.slice(0, numRows), JSON.stringify({ messages })]
  const data = join(folder, 'rows.jsonl')
  writeFileSync(data, `${lines.join('\n')}\n`)
  return { model: folder, data }
}
