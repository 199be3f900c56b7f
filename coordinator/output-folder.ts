/** Where a job's results go: checked before it starts, filled at its end, all or nothing. */
import { accessSync, constants, existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { chmod, copyFile, mkdir, open, rename, rm, writeFile } from 'node:fs/promises'
import { dirname, isAbsolute, join, normalize } from 'node:path'
import { diskError } from '../proto/disk-error.js'
import { TunemeshError } from '../proto/errors.js'
import type { Artifact__Output } from '../proto/gen/tunemesh/v1/Artifact.js'
import type { JobId } from '../proto/ids.js'
import { type BlobStore, syncFolder } from './blob-store.js'
import { hasEnded, type JobRecord } from './job-store.js'

/** The run record: job file, digests, versions, every step's figures. */
export const runRecordName = 'run.json'

/**
 * @param resumed the job that is to go on: what it delivered there itself is no obstacle
 * @throws TunemeshError OUTPUT_IN_USE: another job writes there, or it holds something already
 */
export function assertOutputFree(outputDir: string, jobs: JobRecord[], resumed?: JobId): void {
  const other = jobs.find((job) => job.outputDir === outputDir && !hasEnded(job))
  if (other !== undefined) {
    throw new TunemeshError(
      'OUTPUT_IN_USE',
      `output_dir ${outputDir} belongs to job ${other.jobId}, which is ${other.state}. ` +
        'Choose another output_dir, or wait for that job.',
    )
  }
  if (resumed !== undefined && jobIdIn(join(outputDir, runRecordName)) === resumed) return
  const found = statSync(outputDir, { throwIfNoEntry: false })
  if (found !== undefined && (!found.isDirectory() || readdirSync(outputDir).length > 0)) {
    throw new TunemeshError(
      'OUTPUT_IN_USE',
      `output_dir ${outputDir} is ${found.isDirectory() ? 'not empty' : 'a file'}. ` +
        'Choose another one (train and plan take --output-dir), or move it away.',
    )
  }
  const parent = nearestFolder(dirname(outputDir))
  if (isWritable(parent)) return
  throw new TunemeshError(
    'OUTPUT_IN_USE',
    `output_dir ${outputDir} cannot be made: ${parent} is not writable. Choose another one.`,
  )
}

function nearestFolder(path: string): string {
  return existsSync(path) || dirname(path) === path ? path : nearestFolder(dirname(path))
}

function isWritable(path: string): boolean {
  try {
    accessSync(path, constants.W_OK)
    return statSync(path).isDirectory()
  } catch {
    return false
  }
}

export interface Delivery {
  jobId: string
  outputDir: string
  artifacts: Artifact__Output[]
  /** Small files beside the artifacts: name → text. */
  texts: Record<string, string>
}

/** Builds the whole folder beside its place and renames it there. */
export async function deliver(store: BlobStore, delivery: Delivery): Promise<void> {
  const { outputDir } = delivery
  const temp = join(dirname(outputDir), `.${outputDir.split('/').at(-1)}.tunemesh-part`)
  try {
    await rm(temp, { recursive: true, force: true })
    await mkdir(temp, { recursive: true })
    for (const artifact of delivery.artifacts) {
      const path = join(temp, safeRelative(artifact.path))
      await mkdir(dirname(path), { recursive: true })
      await copyFile(store.pathOf(artifact.digest), path, constants.COPYFILE_FICLONE)
      // Blobs are for this user only; a result is as open as any new file.
      await chmod(path, 0o666 & ~process.umask())
      await sync(path)
    }
    for (const [name, text] of Object.entries(delivery.texts)) {
      await writeFile(join(temp, name), text)
      await sync(join(temp, name))
    }
    await syncFolder(temp)
    await removeEarlierDelivery(delivery)
    await rename(temp, outputDir)
    await syncFolder(dirname(outputDir))
  } catch (error) {
    await rm(temp, { recursive: true, force: true })
    throw diskError(error, `The result in ${outputDir}`)
  }
}

/**
 * A coordinator may have died between the rename and saying so; anything else there is not ours.
 */
async function removeEarlierDelivery({ jobId, outputDir }: Delivery): Promise<void> {
  if (!existsSync(outputDir)) return
  const isOurs = jobIdIn(join(outputDir, runRecordName)) === jobId
  if (!isOurs && readdirSync(outputDir).length > 0) {
    throw new TunemeshError(
      'OUTPUT_IN_USE',
      `output_dir ${outputDir} was empty when job ${jobId} began and no longer is. ` +
        `Move its files away, then \`tunemesh resume ${jobId}\`.`,
    )
  }
  await rm(outputDir, { recursive: true })
}

function jobIdIn(path: string): string | null {
  try {
    return (JSON.parse(readFileSync(path, 'utf8')) as { jobId?: string }).jobId ?? null
  } catch {
    return null // none there, or not one of ours
  }
}

/** A worker names the files; it must not choose a place outside the folder. */
function safeRelative(path: string): string {
  const clean = normalize(path)
  const isInside = clean !== '' && !isAbsolute(clean) && !clean.split('/').includes('..')
  if (isInside && !clean.includes('\0')) return clean
  throw new TunemeshError(
    'WORKER_FAILED',
    `A worker delivered a file named ${JSON.stringify(path)}.`,
  )
}

async function sync(path: string): Promise<void> {
  const file = await open(path, 'r')
  try {
    await file.sync()
  } finally {
    await file.close()
  }
}
