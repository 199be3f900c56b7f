/**
 * `npm run golden -- --device cuda --precision bf16` without a card: the whole mesh, full
 * fine-tuning with bf16 weights and moments, and with float32 masters, and LoRA, on a host whose
 * elements are bf16. The limits are those of a card.
 */
import assert from 'node:assert/strict'
import { join } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { goldenFolder } from '../unit/engine-fixture.js'
import { hostCard, lacks, ProgramCopy } from './host-card.js'

describe('20 golden steps in bf16', { skip: lacks(hostCard), timeout: 300_000 }, () => {
  let copy: ProgramCopy
  before(() => {
    copy = new ProgramCopy(hostCard)
  })
  after(() => copy.remove())

  test('stay within 1 % of the reference, with bf16 states and with float32 masters', () => {
    const golden = join('test', 'golden-run', 'golden.js')
    const options = ['--device', 'cuda', '--precision', 'bf16', '--workers', '1', '--no-skips']
    const { stdout, stderr, status } = copy.run(golden, [goldenFolder('llama-tied'), ...options])
    assert.equal(status, 0, stdout + stderr)
    for (const method of ['full', 'full, fp32 master,', 'lora'])
      assert.match(stdout, new RegExp(`^ok .* ${method} 20 steps, 1 worker: loss `, 'm'))
  })
})
