/**
 * The files of a model or adapter as workers are told of them, and their bytes for those workers
 * that cannot read them where they lie. Nothing is copied: the blob store refers to the files.
 */
import { createHash } from 'node:crypto'
import { createReadStream, existsSync, readdirSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { companionFiles, fileStamp, type ModelFile } from '../proto/model-file.js'
import type { BlobStore } from './blob-store.js'
import type { BaseModel } from './ingest-model.js'

export interface DescribedModel {
  /** "sha256:<hex>" over the names and SHA-256 of the files of weights and shape. */
  modelDigest: string
  /** Those, and the tokenizer's. */
  modelFiles: ModelFile[]
}

/** Reads every file once; digests of files that have not changed since are remembered. */
export async function describeModel(model: BaseModel): Promise<DescribedModel> {
  const whole = createHash('sha256')
  const modelFiles: ModelFile[] = []
  for (const path of [...model.files].sort()) {
    const file = await describeFile(path)
    whole.update(`${file.name} ${file.digest.slice('sha256:'.length)}\n`)
    modelFiles.push(file)
  }
  for (const path of companionsOf(model)) modelFiles.push(await describeFile(path))
  return { modelDigest: `sha256:${whole.digest('hex')}`, modelFiles }
}

/** As they lie there, unread: for a worker of this machine. */
export const undigested = (model: BaseModel): ModelFile[] =>
  [...model.files, ...companionsOf(model)].map((path) => described(path, ''))

/** The files of an adapter's folder. */
export async function describeFolder(folder: string): Promise<ModelFile[]> {
  const paths = readdirSync(folder).map((name) => join(folder, name))
  return Promise.all(paths.filter((path) => statSync(path).isFile()).map(describeFile))
}

/**
 * Makes the files of `place` (a folder, or the one file) blobs that workers may fetch.
 * @throws TunemeshError MODEL_NOT_FOUND or MODEL_INVALID where a file is gone or was changed since
 *   it was described
 */
export async function offerFiles(
  blobs: BlobStore,
  place: string,
  files: readonly ModelFile[],
): Promise<void> {
  const isFolder = existsSync(place) && statSync(place).isDirectory()
  for (const file of files) {
    const path = isFolder ? join(place, file.name) : place
    if (!existsSync(path)) {
      throw new TunemeshError(
        'MODEL_NOT_FOUND',
        `${path}, a file of the job's model, is gone since the job was prepared. Put it back.`,
      )
    }
    const now = described(path, '')
    if (now.stamp !== file.stamp && (await fileDigest(path)) !== file.digest) {
      throw new TunemeshError(
        'MODEL_INVALID',
        `${path} has changed since the job was prepared: it had ${file.sizeBytes} bytes and ` +
          `${file.digest}, now it has ${now.sizeBytes}. Put it back, or submit the job anew.`,
      )
    }
    await blobs.reference(path, file.digest)
  }
}

function companionsOf({ path, files }: BaseModel): string[] {
  if (!statSync(path).isDirectory()) return []
  return readdirSync(path)
    .filter((name) => companionFiles.has(name))
    .map((name) => join(path, name))
    .filter((companion) => !files.includes(companion))
    .sort()
}

const describeFile = async (path: string): Promise<ModelFile> =>
  described(path, await fileDigest(path))

function described(path: string, digest: string): ModelFile {
  const stats = statSync(path)
  return { name: basename(path), digest, sizeBytes: stats.size, stamp: fileStamp(stats) }
}

/** Bounded: a coordinator meets few models, and a forgotten digest is only computed again. */
const maxRemembered = 1000
const remembered = new Map<string, string>()

async function fileDigest(path: string): Promise<string> {
  const key = `${path} ${fileStamp(statSync(path))}`
  const known = remembered.get(key)
  if (known !== undefined) return known
  const hash = createHash('sha256')
  for await (const piece of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(piece)
  const digest = `sha256:${hash.digest('hex')}`
  if (remembered.size >= maxRemembered) remembered.clear()
  remembered.set(key, digest)
  return digest
}
