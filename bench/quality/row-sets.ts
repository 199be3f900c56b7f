/** Rows to train on and rows held out, as files of messages in a folder of our own. */
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

export interface RowSet {
  name: string
  train: string
  heldOut: string
  /** Packs of a step and tokens of a pack that suit these rows. */
  batch: number
  maxLength: number
}

/** About 25 rows of GSM8K make a step, one pass is 300 steps; of the demo's 64 rows 8. */
const sizes = {
  gsm8k: { batch: 8, maxLength: 512 },
  'drug-names': { batch: 1, maxLength: 224 },
}

export interface RowSources {
  /** Folder with train.jsonl and test.jsonl of `question` and `answer`. */
  gsm8k: string | undefined
  /** Folder with train.jsonl and never-seen.jsonl, as the demo writes them. */
  drugNames: string | undefined
  /** At most so many rows are held out. */
  heldOutRows: number
}

/** @throws RangeError where a folder given lacks a file, or none is given */
export async function writeRowSets(sources: RowSources, workDir: string): Promise<RowSet[]> {
  const sets: RowSet[] = []
  if (sources.gsm8k !== undefined) sets.push(gsm8kRows(sources.gsm8k, sources.heldOutRows, workDir))
  const drugNames = sources.drugNames ?? (await demoRows(join(workDir, 'drug-names')))
  if (drugNames !== null) sets.push(copiedRows(drugNames, sources.heldOutRows, workDir))
  if (sets.length > 0) return sets
  throw new RangeError(
    'no rows: give --gsm8k FOLDER (train.jsonl, test.jsonl) or --drug-names FOLDER (train.jsonl, ' +
      'never-seen.jsonl; node build/examples/drug-names/build-rows.js --out FOLDER writes them).',
  )
}

function gsm8kRows(folder: string, heldOutRows: number, workDir: string): RowSet {
  const messages = (line: string) => {
    const { question, answer } = JSON.parse(line) as { question: string; answer: string }
    return JSON.stringify({
      messages: [
        { role: 'user', content: question },
        { role: 'assistant', content: answer },
      ],
    })
  }
  const train = linesOf(join(folder, 'train.jsonl')).map(messages)
  const heldOut = linesOf(join(folder, 'test.jsonl')).slice(0, heldOutRows).map(messages)
  return written('gsm8k', { train, heldOut }, workDir)
}

function copiedRows(folder: string, heldOutRows: number, workDir: string): RowSet {
  const train = linesOf(join(folder, 'train.jsonl'))
  const heldOut = linesOf(join(folder, 'never-seen.jsonl')).slice(0, heldOutRows)
  return written('drug-names', { train, heldOut }, workDir)
}

/** Null where the dictionary is not installed, as in the bundle. */
async function demoRows(folder: string): Promise<string | null> {
  try {
    const { writeRows } = await import('../../examples/drug-names/build-rows.js')
    writeRows(folder, 1)
    return folder
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'MODULE_NOT_FOUND') return null
    if ((error as NodeJS.ErrnoException).code === 'ERR_MODULE_NOT_FOUND') return null
    throw error
  }
}

function linesOf(path: string): string[] {
  if (!existsSync(path)) throw new RangeError(`${path} is not there.`)
  return readFileSync(path, 'utf8').trim().split('\n')
}

function written(
  name: keyof typeof sizes,
  rows: { train: string[]; heldOut: string[] },
  workDir: string,
): RowSet {
  const folder = join(workDir, 'rows', name)
  mkdirSync(folder, { recursive: true })
  const paths = { train: join(folder, 'train.jsonl'), heldOut: join(folder, 'held-out.jsonl') }
  writeFileSync(paths.train, `${rows.train.join('\n')}\n`)
  writeFileSync(paths.heldOut, `${rows.heldOut.join('\n')}\n`)
  return { name, ...paths, ...sizes[name] }
}
