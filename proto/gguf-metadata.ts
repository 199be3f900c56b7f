/**
 * The header of a GGUF file: key-value metadata and tensor descriptions, no tensor data.
 *
 * Written against the specification in ggml's docs/gguf.md, versions 2 and 3, little-endian. A file
 * is not trusted: every length is checked against a limit and against what is left of the file.
 */
import { closeSync, fstatSync, openSync, readSync } from 'node:fs'
import { TunemeshError } from './errors.js'

type GgufValue = number | bigint | boolean | string | GgufValue[]

interface GgufTensor {
  name: string
  /** Slowest dimension first, as in safetensors; the file has it the other way round. */
  shape: number[]
  /** "F32", "Q4_1", ... */
  type: string
  /** From the start of the file. */
  offset: number
  sizeBytes: number
}

export interface GgufFile {
  version: number
  metadata: Map<string, GgufValue>
  tensors: GgufTensor[]
}

const limits = {
  metadataEntries: 65_536,
  tensors: 65_536,
  stringBytes: 16 << 20,
  arrayElements: 4 << 20,
  headerBytes: 512 << 20,
  dimensions: 4,
}

/** ggml's type number → name, elements of a block, bytes of a block. */
const tensorTypes = new Map<number, [name: string, blockElements: number, blockBytes: number]>([
  [0, ['F32', 1, 4]],
  [1, ['F16', 1, 2]],
  [2, ['Q4_0', 32, 18]],
  [3, ['Q4_1', 32, 20]],
  [6, ['Q5_0', 32, 22]],
  [7, ['Q5_1', 32, 24]],
  [8, ['Q8_0', 32, 34]],
  [9, ['Q8_1', 32, 36]],
  [10, ['Q2_K', 256, 84]],
  [11, ['Q3_K', 256, 110]],
  [12, ['Q4_K', 256, 144]],
  [13, ['Q5_K', 256, 176]],
  [14, ['Q6_K', 256, 210]],
  [30, ['BF16', 1, 2]],
])

/** @throws TunemeshError GGUF_INVALID */
export function readGguf(path: string): GgufFile {
  const file = openSync(path, 'r')
  try {
    return readHeader(new Reader(file, fstatSync(file).size, path))
  } finally {
    closeSync(file)
  }
}

function readHeader(reader: Reader): GgufFile {
  const magic = reader.fileBytes < 4 ? '' : reader.bytes(4).toString('latin1')
  if (magic !== 'GGUF') {
    throw reader.invalid(`starts with ${JSON.stringify(magic)} instead of "GGUF"`)
  }
  const version = reader.uint32()
  if (version !== 2 && version !== 3)
    throw reader.invalid(`has version ${version}, expected 2 or 3`)
  const numTensors = reader.count('tensors', limits.tensors)
  const numEntries = reader.count('metadata entries', limits.metadataEntries)
  const metadata = new Map<string, GgufValue>()
  for (let i = 0; i < numEntries; i += 1) {
    const key = reader.string('a metadata key')
    if (metadata.has(key)) throw reader.invalid(`has the metadata key "${key}" twice`)
    metadata.set(key, readValue(reader, reader.uint32(), key))
  }
  const described = Array.from({ length: numTensors }, () => readTensor(reader))
  return { version, metadata, tensors: placed(reader, described, metadata) }
}

const arrayType = 9

const readScalar: Record<number, (reader: Reader, key: string) => GgufValue> = {
  0: (reader) => reader.bytes(1).readUInt8(),
  1: (reader) => reader.bytes(1).readInt8(),
  2: (reader) => reader.bytes(2).readUInt16LE(),
  3: (reader) => reader.bytes(2).readInt16LE(),
  4: (reader) => reader.uint32(),
  5: (reader) => reader.bytes(4).readInt32LE(),
  6: (reader) => reader.bytes(4).readFloatLE(),
  7: (reader) => reader.bytes(1).readUInt8() !== 0,
  8: (reader, key) => reader.string(`the value of "${key}"`),
  10: (reader) => narrowed(reader.bytes(8).readBigUInt64LE()),
  11: (reader) => narrowed(reader.bytes(8).readBigInt64LE()),
  12: (reader) => reader.bytes(8).readDoubleLE(),
}

const narrowed = (value: bigint): number | bigint =>
  value >= BigInt(Number.MIN_SAFE_INTEGER) && value <= BigInt(Number.MAX_SAFE_INTEGER)
    ? Number(value)
    : value

function readValue(reader: Reader, type: number, key: string): GgufValue {
  if (type !== arrayType) return readKnown(reader, type, key)
  const elementType = reader.uint32()
  // An array of arrays is legal but used by no model; refusing it bounds the depth.
  if (elementType === arrayType) throw reader.invalid(`has an array of arrays in "${key}"`)
  const length = reader.count(`elements of "${key}"`, limits.arrayElements)
  const values: GgufValue[] = []
  for (let i = 0; i < length; i += 1) values.push(readKnown(reader, elementType, key))
  return values
}

function readKnown(reader: Reader, type: number, key: string): GgufValue {
  const read = readScalar[type]
  if (!read) throw reader.invalid(`has a value of unknown type ${type} in "${key}"`)
  return read(reader, key)
}

interface DescribedTensor {
  name: string
  shape: number[]
  typeNumber: number
  relativeOffset: bigint
}

function readTensor(reader: Reader): DescribedTensor {
  const name = reader.string('a tensor name')
  const numDims = reader.uint32()
  if (numDims < 1 || numDims > limits.dimensions) {
    throw reader.invalid(`has "${name}" of ${numDims} dimensions, at most ${limits.dimensions}`)
  }
  const shape: number[] = []
  for (let i = 0; i < numDims; i += 1) {
    shape.unshift(reader.count(`elements of a side of "${name}"`, 2 ** 40))
  }
  return {
    name,
    shape,
    typeNumber: reader.uint32(),
    relativeOffset: reader.bytes(8).readBigUInt64LE(),
  }
}

/** Checks that every tensor lies inside the file, aligned and named once. */
function placed(
  reader: Reader,
  described: DescribedTensor[],
  metadata: Map<string, GgufValue>,
): GgufTensor[] {
  const alignment = metadata.get('general.alignment') ?? 32
  if (typeof alignment !== 'number' || alignment < 1 || alignment > 65_536 || alignment % 8 !== 0) {
    throw reader.invalid(`has general.alignment ${String(alignment)}, expected a multiple of 8`)
  }
  const dataStart = Math.ceil(reader.position / alignment) * alignment
  const names = new Set<string>()
  return described.map(({ name, shape, typeNumber, relativeOffset }) => {
    if (names.has(name)) throw reader.invalid(`has the tensor "${name}" twice`)
    names.add(name)
    const known = tensorTypes.get(typeNumber)
    if (!known) throw reader.invalid(`has "${name}" of unknown type ${typeNumber}`)
    const [type, blockElements, blockBytes] = known
    const numElements = shape.reduce((product, side) => product * side, 1)
    if (numElements < 1 || (shape.at(-1) ?? 0) % blockElements !== 0) {
      throw reader.invalid(
        `has "${name}" ${type} of shape [${shape}], not in blocks of ${blockElements}`,
      )
    }
    const offset = dataStart + Number(relativeOffset)
    const sizeBytes = (numElements / blockElements) * blockBytes
    if (offset % alignment !== 0) throw reader.invalid(`has "${name}" at unaligned byte ${offset}`)
    if (offset + sizeBytes > reader.fileBytes) {
      throw reader.invalid(
        `has "${name}" at bytes ${offset} to ${offset + sizeBytes}, but only ` +
          `${reader.fileBytes} bytes. It is cut short`,
      )
    }
    return { name, shape, type, offset, sizeBytes }
  })
}

const pieceBytes = 1 << 20

/** Reads forward through a file, a piece at a time, and never past its end or the header limit. */
class Reader {
  /** Of the next byte to be read, from the start of the file. */
  position = 0
  private piece: Buffer = Buffer.alloc(0)
  private pieceStart = 0

  constructor(
    private readonly file: number,
    readonly fileBytes: number,
    private readonly path: string,
  ) {}

  invalid(problem: string): TunemeshError {
    return new TunemeshError('GGUF_INVALID', `${this.path} ${problem}. Download the file again.`)
  }

  /** Valid until the next call. */
  bytes(length: number): Buffer {
    const end = this.position + length
    if (end > this.fileBytes) {
      throw this.invalid(`ends at byte ${this.fileBytes} inside its header`)
    }
    if (end > limits.headerBytes) {
      throw this.invalid(`has a header of more than ${limits.headerBytes} bytes`)
    }
    if (end > this.pieceStart + this.piece.length) this.load(Math.max(length, pieceBytes))
    const from = this.position - this.pieceStart
    this.position = end
    return this.piece.subarray(from, from + length)
  }

  uint32(): number {
    return this.bytes(4).readUInt32LE()
  }

  /** A 64-bit count within a limit. */
  count(what: string, most: number): number {
    const value = this.bytes(8).readBigUInt64LE()
    if (value > BigInt(most)) throw this.invalid(`claims ${value} ${what}, at most ${most}`)
    return Number(value)
  }

  string(what: string): string {
    const length = this.count(`bytes for ${what}`, limits.stringBytes)
    const bytes = this.bytes(length)
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes)
    } catch {
      throw this.invalid(`has bytes that are not UTF-8 in ${what}, before byte ${this.position}`)
    }
  }

  private load(length: number): void {
    const piece = Buffer.alloc(Math.min(length, this.fileBytes - this.position))
    let filled = 0
    while (filled < piece.length) {
      const room = piece.length - filled
      const read = readSync(this.file, piece, filled, room, this.position + filled)
      if (read === 0) throw this.invalid(`ended at byte ${this.position + filled} while being read`)
      filled += read
    }
    this.piece = piece
    this.pieceStart = this.position
  }
}
