import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { heldOut } from '../../coordinator/ingest-rows.js'
import {
  countShifted,
  countTargets,
  type LabelledIds,
  packRows,
  planPacks,
} from '../../coordinator/packing.js'
import { TunemeshError } from '../../proto/errors.js'
import { type PackShard, packAt, packShardBytes, readPackShard } from '../../proto/pack-shard.js'

/** Row `index` of ids 100·index, 100·index + 1, …; all but the first `untrained` are trained. */
function row(index: number, length: number, untrained = 1): LabelledIds {
  const ids = Int32Array.from({ length }, (_, i) => 100 * index + i)
  return { ids, labels: ids.map((id, i) => (i < untrained ? -100 : id)) }
}

const packed = { packing: true, maxLength: 16, bucketTokens: 8 }

describe('packing', () => {
  it('lays rows side by side, shifts targets within each, and fills to exactly T', () => {
    const shard = packRows([row(1, 3), row(2, 5, 3)], { ...packed, maxLength: 10 })
    assert.deepEqual(
      {
        tokens: [...shard.tokens],
        targets: [...shard.targets],
        packOffsets: [...shard.packOffsets],
        documentStarts: [...shard.documentStarts],
        documentOffsets: [...shard.documentOffsets],
      },
      {
        tokens: [200, 201, 202, 203, 204, 100, 101, 102, 0, 0],
        targets: [-100, -100, 203, 204, -100, 101, 102, -100, -100, -100],
        packOffsets: [0, 10],
        documentStarts: [0, 5, 8, 10],
        documentOffsets: [0, 4],
      },
    )
    assert.deepEqual([...countTargets(shard)], [4])
  })

  it('holds every row once, in packs of exactly T, whatever the lengths', () => {
    const lengths = Array.from({ length: 301 }, (_, i) => 1 + ((i * 7919) % 97))
    const packs = planPacks(lengths, 97)
    assert.deepEqual(
      packs.flatMap((pack) => pack.rows).sort((a, b) => a - b),
      lengths.map((_, i) => i),
    )
    const fill = packs.map((pack) => pack.rows.reduce((sum, i) => sum + (lengths[i] ?? 0), 0))
    assert.ok(fill.every((tokens) => tokens <= 97))
    assert.ok(packs.every((pack) => pack.tokens === 97))
    const least = Math.ceil(lengths.reduce((a, b) => a + b) / 97)
    assert.ok(packs.length <= 1.02 * least, `${packs.length} packs, ${least} at least`)
  })

  it('takes the fullest pack that has room, as best fit does', () => {
    // 9 and 8 open packs with room for 7 and 8; 7 fits both and takes the tighter one.
    assert.deepEqual(
      planPacks([9, 8, 7], 16).map(({ rows }) => rows),
      [[0, 2], [1]],
    )
  })

  it('agrees with a search through all packs', () => {
    const lengths = Array.from({ length: 200 }, (_, i) => 1 + ((i * 131 + 17) % 53))
    assert.deepEqual(
      planPacks(lengths, 64).map(({ rows }) => rows),
      slowBestFit(lengths, 64),
    )
  })

  it('without packing gives each row a pack, filled to a bucket, not beyond max_length', () => {
    const rows = [row(1, 3), row(2, 8), row(3, 9), row(4, 15)]
    const shard = packRows(rows, { packing: false, maxLength: 15, bucketTokens: 8 })
    assert.deepEqual([...shard.packOffsets], [0, 8, 16, 31, 46])
    assert.deepEqual([...packAt(shard, 0).documentStarts], [0, 3, 8])
    assert.deepEqual([...packAt(shard, 1).documentStarts], [0, 8])
    assert.deepEqual([...packAt(shard, 2).documentStarts], [0, 9, 15])
    assert.deepEqual([...packAt(shard, 3).documentStarts], [0, 15])
  })

  it('cuts long filling into documents of at most 64 tokens', () => {
    const shard = packRows([row(1, 10)], { ...packed, maxLength: 200 })
    assert.deepEqual([...shard.documentStarts], [0, 10, 74, 138, 200])
  })

  it('does not count the first label of a row, which nothing predicts', () => {
    assert.equal(countShifted(Int32Array.from([5, -100, -100])), 0)
    assert.equal(countShifted(Int32Array.from([-100, 5, 6])), 2)
  })

  it('is the same for the same rows', () => {
    const rows = Array.from({ length: 50 }, (_, i) => row(i, 2 + (i % 14)))
    assert.deepEqual(packRows(rows, packed), packRows(rows, packed))
  })
})

/** Best fit decreasing by looking at every pack; of equal rooms the one that is oldest. */
function slowBestFit(lengths: number[], packTokens: number): number[][] {
  const packs: { rows: number[]; room: number; since: number }[] = []
  const order = lengths
    .map((_, i) => i)
    .sort((a, b) => (lengths[b] ?? 0) - (lengths[a] ?? 0) || a - b)
  for (const [turn, index] of order.entries()) {
    const length = lengths[index] ?? 0
    const fitting = packs
      .filter((pack) => pack.room >= length)
      .sort((a, b) => a.room - b.room || a.since - b.since)
    const [pack = { rows: [], room: packTokens, since: 0 }] = fitting
    if (fitting.length === 0) packs.push(pack)
    pack.rows.push(index)
    pack.room -= length
    pack.since = turn
  }
  return packs.map(({ rows }) => rows)
}

describe('pack shard', () => {
  const shard = packRows([row(1, 3), row(2, 5), row(3, 7)], { ...packed, maxLength: 8 })
  const bytes = Buffer.concat(packShardBytes(shard))

  it('reads back what was written, also from an unaligned place', () => {
    assert.deepEqual(readPackShard(bytes), shard)
    const shifted = Buffer.concat([Buffer.alloc(1), bytes]).subarray(1)
    assert.deepEqual(readPackShard(shifted), shard)
  })

  it('is refused when it is cut short at any byte', () => {
    for (let length = 0; length < bytes.length; length += 1) {
      assert.throws(() => readPackShard(bytes.subarray(0, length)), isCorrupt, `${length} bytes`)
    }
  })

  it('is refused when its offsets lie', () => {
    const lies: Partial<Record<keyof PackShard, Int32Array>>[] = [
      { packOffsets: Int32Array.from([0, 9, 16]) },
      { packOffsets: Int32Array.from([0, 16, 8]) },
      { packOffsets: Int32Array.from([1, 8, 16]) },
      { documentOffsets: Int32Array.from([0, 2]) },
      { targets: new Int32Array(3) },
    ]
    for (const lie of lies) {
      const wrong = Buffer.concat(packShardBytes({ ...shard, ...lie }))
      assert.throws(() => readPackShard(wrong), isCorrupt, JSON.stringify(lie))
    }
  })

  it('names a pack that it does not have', () => {
    assert.throws(() => packAt(shard, 2), /pack 2 of a shard of 2 packs/)
  })
})

const isCorrupt = (error: unknown) =>
  error instanceof TunemeshError && error.code === 'BLOB_CORRUPT'

describe('validation split', () => {
  it('is the same for the same seed, differs by seed, keeps at least one row on each side', () => {
    assert.deepEqual(heldOut(100, 0.1, 7), heldOut(100, 0.1, 7))
    assert.notDeepEqual(heldOut(100, 0.1, 7), heldOut(100, 0.1, 8))
    assert.equal(heldOut(100, 0.1, 7).size, 10)
    assert.equal(heldOut(2, 0.01, 7).size, 1)
    assert.equal(heldOut(2, 0.5, 7).size, 1)
  })
})
