/** Takes files out of a wheel, which is a zip archive, by its central directory. */
import { createWriteStream } from 'node:fs'
import { type FileHandle, open } from 'node:fs/promises'
import { basename, join } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { createInflateRaw } from 'node:zlib'
import { TunemeshError } from '../proto/errors.js'

interface Entry {
  path: string
  /** 0: stored as it is; 8: deflated. */
  method: number
  packedBytes: number
  sizeBytes: number
  headerOffset: number
}

const endSignature = 0x06054b50
const entrySignature = 0x02014b50
const headerSignature = 0x04034b50
const endBytes = 22
const maxCommentBytes = 0xffff
const entryBytes = 46
const headerBytes = 30
const maxDirectoryBytes = 16 << 20

/**
 * Writes each file of the wheel whose path matches `keep` into `folder`, under its own name.
 *
 * @returns the names written
 * @throws WHEEL_CORRUPT for what is no zip archive, or whose sizes do not hold
 */
export async function unpackWheel(wheel: string, keep: RegExp, folder: string): Promise<string[]> {
  const file = await open(wheel, 'r')
  try {
    const entries = (await readDirectory(file, wheel)).filter(({ path }) => keep.test(path))
    for (const entry of entries) await unpackEntry(file, entry, { wheel, folder })
    return entries.map(({ path }) => basename(path))
  } finally {
    await file.close()
  }
}

async function readDirectory(file: FileHandle, wheel: string): Promise<Entry[]> {
  const { size } = await file.stat()
  const tail = Math.min(size, endBytes + maxCommentBytes)
  const last = await readAt(file, { offset: size - tail, bytes: tail })
  let at = last.length - endBytes
  while (at >= 0 && last.readUInt32LE(at) !== endSignature) at--
  if (at < 0) throw corrupt(wheel, 'it has no central directory')
  const count = last.readUInt16LE(at + 10)
  const bytes = last.readUInt32LE(at + 12)
  const offset = last.readUInt32LE(at + 16)
  // The pinned wheels are below 4 GiB: the 64-bit form has no place here.
  if (bytes > maxDirectoryBytes || offset + bytes > size) {
    throw corrupt(wheel, `its directory of ${bytes} bytes at ${offset} is not within ${size} bytes`)
  }
  return entriesOf(await readAt(file, { offset, bytes }), count, wheel)
}

function entriesOf(directory: Buffer, count: number, wheel: string): Entry[] {
  const entries: Entry[] = []
  for (let at = 0; entries.length < count; ) {
    if (at + entryBytes > directory.length || directory.readUInt32LE(at) !== entrySignature) {
      throw corrupt(wheel, `entry ${entries.length + 1} of ${count} is broken`)
    }
    const nameBytes = directory.readUInt16LE(at + 28)
    const extraBytes = directory.readUInt16LE(at + 30) + directory.readUInt16LE(at + 32)
    entries.push({
      path: directory.toString('utf8', at + entryBytes, at + entryBytes + nameBytes),
      method: directory.readUInt16LE(at + 10),
      packedBytes: directory.readUInt32LE(at + 20),
      sizeBytes: directory.readUInt32LE(at + 24),
      headerOffset: directory.readUInt32LE(at + 42),
    })
    at += entryBytes + nameBytes + extraBytes
  }
  return entries
}

async function unpackEntry(
  file: FileHandle,
  entry: Entry,
  { wheel, folder }: { wheel: string; folder: string },
): Promise<void> {
  const { path, method, packedBytes, sizeBytes, headerOffset } = entry
  const header = await readAt(file, { offset: headerOffset, bytes: headerBytes })
  if (header.length < headerBytes || header.readUInt32LE(0) !== headerSignature) {
    throw corrupt(wheel, `${path} is not where the directory says`)
  }
  if (method !== 0 && method !== 8) throw corrupt(wheel, `${path} is packed by method ${method}`)
  const start = headerOffset + headerBytes + header.readUInt16LE(26) + header.readUInt16LE(28)
  const to = join(folder, basename(path))
  const source = file.createReadStream({
    start,
    end: Math.max(start, start + packedBytes - 1),
    autoClose: false,
    highWaterMark: 1 << 20,
  })
  const sink = createWriteStream(to, { mode: 0o755 })
  try {
    if (method === 0) await pipeline(source, sink)
    else await pipeline(source, createInflateRaw({ chunkSize: 1 << 20 }), sink)
  } catch (cause) {
    if ((cause as NodeJS.ErrnoException).code?.startsWith('Z_') !== true) throw cause
    throw corrupt(wheel, `${path}: ${(cause as Error).message}`)
  }
  if (sink.bytesWritten !== sizeBytes) {
    throw corrupt(wheel, `${path} has ${sink.bytesWritten} bytes, not ${sizeBytes}`)
  }
}

async function readAt(
  file: FileHandle,
  { offset, bytes }: { offset: number; bytes: number },
): Promise<Buffer> {
  const buffer = Buffer.alloc(bytes)
  const { bytesRead } = await file.read(buffer, 0, bytes, Math.max(0, offset))
  return buffer.subarray(0, bytesRead)
}

const corrupt = (wheel: string, why: string) =>
  new TunemeshError('WHEEL_CORRUPT', `${wheel} can not be unpacked: ${why}. Run it again.`)
