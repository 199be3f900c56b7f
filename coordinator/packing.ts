/**
 * Lays rows out in packs: with packing, whole rows side by side in packs of exactly T tokens;
 * without, one row a pack, filled up to a length bucket. A pure function of the rows in order.
 */
import { noTarget, type PackShard } from '../proto/pack-shard.js'

export interface LabelledIds {
  ids: Int32Array
  /** Aligned with ids; the shift happens here, within each row. */
  labels: Int32Array
}

export interface PackingOptions {
  packing: boolean
  /** With packing every pack has exactly so many tokens; no row is longer. */
  maxLength: number
  /** Without packing lengths are multiples of it, so that few shapes occur. */
  bucketTokens: number
}

/** Lengths without packing are multiples of this, up to max_length. */
export const lengthBucketTokens = 64

/** Filling is cut into documents of this length: attention over it costs little. */
const fillDocumentTokens = 64

export function packRows(rows: readonly LabelledIds[], options: PackingOptions): PackShard {
  const lengths = rows.map((row) => row.ids.length)
  const plan = options.packing
    ? planPacks(lengths, options.maxLength)
    : lengths.map((length, row) => ({ rows: [row], tokens: bucketOf(length, options) }))
  return layOut(rows, plan)
}

export interface PlannedPack {
  /** Indices of rows, in their order within the pack. */
  rows: number[]
  tokens: number
}

/** Best fit decreasing: the longest row first, each into the fullest pack that has room for it. */
export function planPacks(lengths: readonly number[], packTokens: number): PlannedPack[] {
  const order = lengths.map((_, row) => row)
  order.sort((a, b) => (lengths[b] ?? 0) - (lengths[a] ?? 0) || a - b)
  const packs: PlannedPack[] = []
  const withRoom = new RoomIndex(packTokens)
  for (const row of order) {
    const length = lengths[row] ?? 0
    const room = withRoom.leastFrom(length)
    if (room === null) {
      packs.push({ rows: [row], tokens: packTokens })
      withRoom.add(packTokens - length, packs.length - 1)
    } else {
      const pack = withRoom.take(room)
      packs[pack]?.rows.push(row)
      withRoom.add(room - length, pack)
    }
  }
  return packs
}

/** Targets of each pack: what the loss is divided by. */
export function countTargets(shard: PackShard): Int32Array {
  const counts = new Int32Array(shard.packOffsets.length - 1)
  for (let pack = 0; pack < counts.length; pack += 1) {
    const end = shard.packOffsets[pack + 1] ?? 0
    let count = 0
    for (let i = shard.packOffsets[pack] ?? 0; i < end; i += 1) {
      if (shard.targets[i] !== noTarget) count += 1
    }
    counts[pack] = count
  }
  return counts
}

/** Labels that some position predicts: all but the first. */
export function countShifted(labels: Int32Array): number {
  let count = 0
  for (let i = 1; i < labels.length; i += 1) if (labels[i] !== noTarget) count += 1
  return count
}

const bucketOf = (length: number, { maxLength, bucketTokens }: PackingOptions): number =>
  Math.max(length, Math.min(maxLength, Math.ceil(length / bucketTokens) * bucketTokens))

function layOut(rows: readonly LabelledIds[], plan: readonly PlannedPack[]): PackShard {
  const numTokens = plan.reduce((sum, pack) => sum + pack.tokens, 0)
  const tokens = new Int32Array(numTokens)
  const targets = new Int32Array(numTokens).fill(noTarget)
  const packOffsets = new Int32Array(plan.length + 1)
  const documentOffsets = new Int32Array(plan.length + 1)
  const documentStarts: number[] = []
  let packStart = 0
  for (const [index, pack] of plan.entries()) {
    let used = 0
    for (const row of pack.rows) {
      const { ids, labels } = rows[row] as LabelledIds
      documentStarts.push(used)
      tokens.set(ids, packStart + used)
      // targets[i] is what position i must predict; the last one of a row predicts nothing.
      targets.set(labels.subarray(1), packStart + used)
      used += ids.length
    }
    for (; used < pack.tokens; used += fillDocumentTokens) documentStarts.push(used)
    documentStarts.push(pack.tokens)
    packStart += pack.tokens
    packOffsets[index + 1] = packStart
    documentOffsets[index + 1] = documentStarts.length
  }
  return {
    tokens,
    targets,
    packOffsets,
    documentStarts: Int32Array.from(documentStarts),
    documentOffsets,
  }
}

/** Packs by their free tokens; finds the least room that is enough in log T steps. */
class RoomIndex {
  private readonly packsByRoom = new Map<number, number[]>()
  /** Binary tree over rooms: how many packs lie below each node; leaves from `size` on. */
  private readonly counts: Uint32Array
  private readonly size: number

  constructor(mostRoom: number) {
    this.size = 2 ** Math.ceil(Math.log2(mostRoom + 1))
    this.counts = new Uint32Array(2 * this.size)
  }

  add(room: number, pack: number): void {
    const packs = this.packsByRoom.get(room)
    if (packs) packs.push(pack)
    else this.packsByRoom.set(room, [pack])
    this.count(room, 1)
  }

  /** Removes and gives the pack that has had this room longest. */
  take(room: number): number {
    const packs = this.packsByRoom.get(room) ?? []
    this.count(room, -1)
    return packs.shift() ?? 0
  }

  leastFrom(room: number): number | null {
    let node = this.size + room
    if (this.at(node) > 0) return room
    // Up until a right neighbour has packs, then down to its leftmost one.
    while (node > 1 && (node % 2 === 1 || this.at(node + 1) === 0)) node = Math.floor(node / 2)
    if (node <= 1) return null
    node += 1
    while (node < this.size) node = this.at(2 * node) > 0 ? 2 * node : 2 * node + 1
    return node - this.size
  }

  private count(room: number, change: 1 | -1): void {
    for (let node = this.size + room; node >= 1; node = Math.floor(node / 2)) {
      this.counts[node] = this.at(node) + change
    }
  }

  private at(node: number): number {
    return this.counts[node] ?? 0
  }
}
