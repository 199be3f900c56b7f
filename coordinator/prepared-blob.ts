/** A prepared job as one blob, so that a resumed job never looks at its rows again. */
import type { BlobStore } from './blob-store.js'
import type { PreparedJob } from './prepared-job.js'

export async function storePrepared(store: BlobStore, prepared: PreparedJob): Promise<string> {
  const text = JSON.stringify(prepared, (_key, value: unknown) =>
    value instanceof Int32Array ? { int32: bytesOf(value).toString('base64') } : value,
  )
  const { digest } = await store.write([new TextEncoder().encode(text)])
  return digest
}

export async function loadPrepared(store: BlobStore, digest: string): Promise<PreparedJob> {
  const pieces: Buffer[] = []
  for await (const piece of store.read(digest)) pieces.push(piece)
  const stored = JSON.parse(Buffer.concat(pieces).toString('utf8'), (_key, value: unknown) =>
    isPackedInt32(value) ? int32Of(Buffer.from(value.int32, 'base64')) : value,
  ) as PreparedJob
  // Jobs of earlier versions name no files: their workers read the model's path.
  const { modelFiles = [], startAdapterFiles = [] } = stored as Partial<PreparedJob>
  return { ...stored, modelFiles, startAdapterFiles }
}

const bytesOf = (values: Int32Array) =>
  Buffer.from(values.buffer, values.byteOffset, values.byteLength)

/** Copied: a Buffer may start at an address that no Int32Array can. */
function int32Of(bytes: Buffer): Int32Array {
  const values = new Int32Array(bytes.length / 4)
  bytesOf(values).set(bytes)
  return values
}

const isPackedInt32 = (value: unknown): value is { int32: string } =>
  typeof value === 'object' &&
  value !== null &&
  Object.keys(value).length === 1 &&
  typeof (value as { int32?: unknown }).int32 === 'string'
