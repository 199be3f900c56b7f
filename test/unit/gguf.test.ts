import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import { TunemeshError } from '../../proto/errors.js'
import { readGguf } from '../../proto/gguf-metadata.js'

const folder = mkdtempSync(join(tmpdir(), 'tunemesh-gguf-'))
after(() => rmSync(folder, { recursive: true, force: true }))
const path = join(folder, 'model.gguf')

const u32 = (value: number) => {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}
const u64 = (value: number | bigint) => {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64LE(BigInt(value))
  return bytes
}
const f32 = (value: number) => {
  const bytes = Buffer.alloc(4)
  bytes.writeFloatLE(value)
  return bytes
}
const text = (value: string) => Buffer.concat([u64(Buffer.byteLength(value)), Buffer.from(value)])
const entry = (key: string, type: number, ...value: Buffer[]) =>
  Buffer.concat([text(key), u32(type), ...value])
const tensor = (name: string, sides: number[], type: number, offset: number | bigint) =>
  Buffer.concat([text(name), u32(sides.length), ...sides.map(u64), u32(type), u64(offset)])

interface Parts {
  entries?: Buffer[]
  tensors?: Buffer[]
  dataBytes?: number
  version?: number
}

function build({ entries = [], tensors = [], dataBytes = 0, version = 3 }: Parts): Buffer {
  const counts = [u64(tensors.length), u64(entries.length)]
  const header = Buffer.concat([
    Buffer.from('GGUF'),
    u32(version),
    ...counts,
    ...entries,
    ...tensors,
  ])
  const fill = Buffer.alloc((32 - (header.length % 32)) % 32)
  return Buffer.concat([header, fill, Buffer.alloc(dataBytes)])
}

function read(bytes: Buffer) {
  writeFileSync(path, bytes)
  return readGguf(path)
}

function refusal(bytes: Buffer): string {
  try {
    read(bytes)
  } catch (error) {
    assert.ok(error instanceof TunemeshError, String(error))
    return `${error.code} ${error.message.replace(path, 'FILE')}`
  }
  assert.fail('the file was accepted')
}

const good: Required<Parts> = {
  version: 3,
  entries: [
    entry('general.name', 8, text('tiny')),
    entry('a.count', 4, u32(7)),
    entry('a.big', 10, u64(2n ** 60n)),
    entry('a.scale', 6, f32(0.5)),
    entry('a.flag', 7, Buffer.from([1])),
    entry('a.list', 9, u32(8), u64(2), text('x'), text('é')),
  ],
  tensors: [tensor('w', [64, 2], 3, 0), tensor('norm', [3], 0, 96)],
  dataBytes: 96 + 12,
}

describe('gguf header', () => {
  it('reads metadata of every kind and tensors with the slowest dimension first', () => {
    const bytes = build(good)
    const dataStart = bytes.length - good.dataBytes
    assert.deepEqual(read(bytes), {
      version: 3,
      metadata: new Map<string, unknown>([
        ['general.name', 'tiny'],
        ['a.count', 7],
        ['a.big', 2n ** 60n],
        ['a.scale', 0.5],
        ['a.flag', true],
        ['a.list', ['x', 'é']],
      ]),
      tensors: [
        { name: 'w', shape: [2, 64], type: 'Q4_1', offset: dataStart, sizeBytes: 80 },
        { name: 'norm', shape: [3], type: 'F32', offset: dataStart + 96, sizeBytes: 12 },
      ],
    })
  })

  it('is refused when the file is cut short at any byte', () => {
    const bytes = build(good)
    for (let length = 0; length < bytes.length; length += 1) {
      assert.match(refusal(bytes.subarray(0, length)), /^GGUF_INVALID FILE /, `${length} bytes`)
    }
  })

  it('says what lies where a tensor reaches beyond the file', () => {
    const bytes = build(good)
    const start = bytes.length - good.dataBytes
    assert.equal(
      refusal(bytes.subarray(0, -1)),
      `GGUF_INVALID FILE has "norm" at bytes ${start + 96} to ${start + 108}, but only ` +
        `${start + 107} bytes. It is cut short. Download the file again.`,
    )
  })

  it('refuses counts, types and offsets that cannot be true', () => {
    const cases: [Buffer, string][] = [
      [Buffer.from('PK\x03\x04 not a model'), 'starts with "PK\\u0003\\u0004" instead of "GGUF"'],
      [build({ version: 1 }), 'has version 1, expected 2 or 3'],
      [
        Buffer.concat([Buffer.from('GGUF'), u32(3), u64(2n ** 63n), u64(0)]),
        'claims 9223372036854775808 tensors, at most 65536',
      ],
      [
        build({ entries: [Buffer.concat([u64(2n ** 40n), Buffer.alloc(16)])] }),
        'claims 1099511627776 bytes for a metadata key, at most 16777216',
      ],
      [build({ entries: [entry('k', 99)] }), 'has a value of unknown type 99 in "k"'],
      [
        build({ entries: [entry('k', 9, u32(4), u64(2n ** 32n))] }),
        'claims 4294967296 elements of "k", at most 4194304',
      ],
      [build({ entries: [entry('k', 9, u32(9), u64(1))] }), 'has an array of arrays in "k"'],
      [
        build({ entries: [entry('k', 4, u32(1)), entry('k', 4, u32(1))] }),
        'has the metadata key "k" twice',
      ],
      [build({ tensors: [tensor('w', [], 0, 0)] }), 'has "w" of 0 dimensions, at most 4'],
      [
        build({ tensors: [tensor('w', [1, 1, 1, 1, 1], 0, 0)] }),
        'has "w" of 5 dimensions, at most 4',
      ],
      [build({ tensors: [tensor('w', [4], 77, 0)], dataBytes: 64 }), 'has "w" of unknown type 77'],
      [
        build({ tensors: [tensor('w', [33], 3, 0)], dataBytes: 64 }),
        'has "w" Q4_1 of shape [33], not in blocks of 32',
      ],
      [
        build({ tensors: [tensor('w', [1], 0, 0), tensor('w', [1], 0, 0)], dataBytes: 64 }),
        'has the tensor "w" twice',
      ],
      [
        build({ entries: [entry('general.alignment', 4, u32(3))] }),
        'has general.alignment 3, expected a multiple of 8',
      ],
    ]
    for (const [bytes, problem] of cases) {
      assert.equal(refusal(bytes), `GGUF_INVALID FILE ${problem}. Download the file again.`)
    }
    assert.match(
      refusal(build({ tensors: [tensor('w', [1], 0, 4)], dataBytes: 64 })),
      /has "w" at unaligned byte \d+\./,
    )
    assert.match(
      refusal(build({ tensors: [tensor('w', [2 ** 39, 2 ** 39], 0, 0)], dataBytes: 64 })),
      /has "w" at bytes \d+ to .* but only \d+ bytes/,
    )
  })

  it('refuses text that is not UTF-8', () => {
    const bad = Buffer.concat([u64(2), Buffer.from([0xc3, 0x28])])
    assert.match(
      refusal(build({ entries: [entry('k', 8, bad)] })),
      /^GGUF_INVALID FILE has bytes that are not UTF-8 in the value of "k", before byte \d+\./,
    )
  })
})
