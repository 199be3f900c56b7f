/**
 * Reads a job file for sending: its text as it is, and the folder that its relative paths start
 * from. Its keys are checked here already, so that a mistake costs no start of a mesh.
 */
import { readFileSync } from 'node:fs'
import { basename, dirname, resolve } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { readJobFile as checkJobFile } from '../proto/job-file.js'

export interface JobFileOptions {
  set?: string[] | undefined
  outputDir?: string | undefined
}

const maxJobFileBytes = 1 << 20

/** @throws TunemeshError JOB_INVALID with every problem of the file's keys */
export function readJobFile(path: string, options: JobFileOptions) {
  const jobFile = textOf(path)
  const jobFileName = basename(path)
  const overrides = overridesOf(options)
  checkJobFile({ text: jobFile, fileName: jobFileName, overrides })
  return { jobFile, jobFileName, baseDir: dirname(resolve(path)), overrides }
}

export function overridesOf(options: JobFileOptions): string[] {
  const overrides = options.set ?? []
  for (const override of overrides) {
    if (!/^[^=\s]+=/.test(override)) {
      throw new TunemeshError(
        'JOB_INVALID',
        `--set ${override} has no "=". Write --set key=value, for example ` +
          '--set learning_rate=1e-4.',
      )
    }
  }
  // Given on the command line, the folder is meant from where the user stands.
  return options.outputDir === undefined
    ? overrides
    : [...overrides, `output_dir=${JSON.stringify(resolve(options.outputDir))}`]
}

function textOf(path: string): string {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT') throw invalid(`${path} does not exist. Give the path of a job file.`)
    if (code === 'EISDIR') throw invalid(`${path} is a folder. Give the path of a job file.`)
    throw invalid(`${path} cannot be read: ${(error as Error).message}`)
  }
  if (bytes.length > maxJobFileBytes) {
    throw invalid(`${path} has ${bytes.length} bytes; a job file has at most ${maxJobFileBytes}.`)
  }
  return bytes.toString('utf8')
}

const invalid = (message: string) => new TunemeshError('JOB_INVALID', message)
