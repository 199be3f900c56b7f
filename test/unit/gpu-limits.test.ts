import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { type Ceilings, limitOf, type Work } from '../../bench/gpu/limits.js'
import { opTable } from '../../bench/gpu/op-table.js'
import { parseRow, parseRows } from '../../bench/gpu/rows.js'

/** One H200, as bench/peers/ceilings.py measured it. */
const h200: Ceilings = {
  device: 'NVIDIA H200',
  bf16: 664315717002027.8,
  fp8: 1298995862598846.8,
  copy: 4298199422469.247,
  attention: {
    '64,512': [258608342202471.78, 156979791908621.75],
    '64,1024': [326414901332920.06, 237154739379197.1],
    '128,512': [335073116117306.8, 200834550431795.28],
    '128,2048': [481498579307848.56, 363733687612458.94],
  },
}

/** Expected figures: the reference arithmetic of the project's study, in Python, same ceilings. */
function assertLimit(work: Work, tokensPerSecond: number, parts: number[]) {
  const limit = limitOf(h200, work)
  assert.ok(
    Math.abs(limit.tokensPerSecond / tokensPerSecond - 1) < 1e-9,
    `${limit.tokensPerSecond} against ${tokensPerSecond}`,
  )
  const found = Object.values(limit.parts).map((ms) => Math.round(ms * 10) / 10)
  assert.deepEqual(found, parts)
}

describe('limit of a step', () => {
  it('of LoRA on an untied 8B model counts no weight gradients and no update', () => {
    const work: Work = { model: 'llama-8b', method: 'lora', batch: 4, seq: 2048 }
    assertLimit(work, 18451.332409975148, [370.2, 39.4, 34.4, 0])
  })

  it('of LoRA on an fp8 base takes its linears, and not the head, at the fp8 rate', () => {
    const work: Work = { model: 'llama-8b', method: 'lora', batch: 4, seq: 2048, precision: 'fp8' }
    assertLimit(work, 29705.37721595655, [202, 39.4, 34.4, 0])
    const { fp8: _, ...other } = h200
    assert.throws(() => limitOf(other, work), /no fp8 rate of NVIDIA H200/)
  })

  it('of full fine-tuning a tied 3B model adds weight gradients and the update', () => {
    const work: Work = { model: 'llama-3b', method: 'full', batch: 4, seq: 512 }
    assertLimit(work, 26246.186342030895, [59.4, 2.8, 3.9, 12])
  })

  it('of a frozen base in fp8 takes that rate for linears and leaves the head in bf16', () => {
    const work: Work = { model: 'llama-8b', method: 'lora', batch: 4, seq: 2048, precision: 'fp8' }
    const card = { ...h200, fp8: 1298995862598846.8 }
    const limit = limitOf(card, work)
    assert.ok(
      Math.abs(limit.tokensPerSecond / 29705.37721595655 - 1) < 1e-9,
      `${limit.tokensPerSecond}`,
    )
  })

  it('takes attention rates between measured lengths in the logarithm of the length', () => {
    const work: Work = { model: 'smollm2-135m', method: 'lora', batch: 8, seq: 700 }
    assertLimit(work, 576001.5222474046, [4.5, 2.2, 3, 0])
  })

  it('takes the nearest measured length where there is one only', () => {
    const one = { ...h200, attention: { '64,512': [1e14, 1e14] as [number, number] } }
    const work: Work = { model: 'llama-1b', method: 'lora', batch: 1, seq: 4096 }
    const forwardFlops = 2 * 4096 * 4096 * 2048 * 16
    assert.ok(
      Math.abs(limitOf(one, work).parts.attention - ((3.5 * forwardFlops) / 1e14) * 1e3) < 1e-9,
    )
  })
})

describe('limit of a step of several micro-batches', () => {
  it('shares the update among them', () => {
    const work: Work = { model: 'llama-3b', method: 'full', batch: 4, seq: 512 }
    const [one, four] = [limitOf(h200, work), limitOf(h200, { ...work, accumulation: 4 })]
    assert.equal(four.parts.update, one.parts.update / 4)
    assert.equal(four.parts.products, one.parts.products)
  })
})

describe('row of the GPU benchmark', () => {
  it('is read from its short name', () => {
    assert.deepEqual(parseRow('3b-full-4x512'), {
      name: '3b-full-4x512',
      model: 'llama-3b',
      method: 'full',
      batch: 4,
      seq: 512,
      precision: 'bf16',
    })
    assert.equal(parseRow('135m-lora-8x512-fp32').precision, 'fp32')
    assert.equal(parseRow('8b-lora-4x2048-fp8').precision, 'fp8')
  })

  it('is refused by its name where it is none', () => {
    assert.throws(() => parseRow('9b-lora-4x512'), /9b-lora-4x512.*8b, 3b, 1b/)
    assert.throws(() => parseRow('8b-lora-0x512'), /8b-lora-0x512/)
    assert.throws(() => parseRow('8b-full-4x512-fp8'), /frozen base of lora/)
  })

  it('by the name of all is every row with a figure to reach, once', () => {
    const names = parseRows('all').map(({ name }) => name)
    assert.equal(new Set(names).size, names.length)
    for (const name of ['8b-full-4x512', 'qwen7b-full-16x1024', '5m-full-8x256'])
      assert.ok(names.includes(name), name)
    assert.deepEqual(
      parseRows('5m-lora-8x256,1b-full-8x2048').map(({ model }) => model),
      ['tiny-5m', 'llama-1b'],
    )
  })
})

describe('table of operations', () => {
  it('sets each operation beside its floor, the longest first', () => {
    const profile = [
      { op: 'add', calls: 2, ms: 1, flops: 0, bytes: h200.copy / 2000 },
      { op: 'linear_forward 576->1536', calls: 4, ms: 6, flops: h200.bf16 / 250, bytes: 1 },
      { op: 'attention_backward', calls: 1, ms: 2, flops: 156979791908621.75 / 1000, bytes: 1 },
      { op: 'copy_in', calls: 3, ms: 1, flops: 0, bytes: 0 },
    ]
    const work: Work = { model: 'smollm2-135m', method: 'lora', batch: 8, seq: 512 }
    const lines = opTable(profile, { card: h200, outsideShare: null }, work).split('\n')
    assert.deepEqual(
      lines.slice(1, 5).map((line) => line.trim().split(/ {2,}/)),
      [
        ['linear_forward 576->1536', '4', '6.000', '60.0 %', '4.000', '1.50'],
        ['attention_backward', '1', '2.000', '20.0 %', '1.000', '2.00'],
        ['add', '2', '1.000', '10.0 %', '0.500', '2.00'],
        ['copy_in', '3', '1.000', '10.0 %', '–', '–'],
      ],
    )
    assert.match(lines[5] ?? '', /^sum 10\.000 ms, of floors 5\.500 ms; every operation waits/)
    const free = opTable(profile, { card: h200, outsideShare: 0.0123 }, work)
    assert.match(free, /1\.2 % of the step between them$/)
  })
})
