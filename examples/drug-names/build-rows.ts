/**
 * Builds the demo's rows from WordNet: questions about medicines, answered by the dictionary.
 *
 *   node build/examples/drug-names/build-rows.js [--out FOLDER] [--seed N]
 *
 *   train.jsonl           64 rows, "What is metformin?" → the gloss
 *   train-shuffled.jsonl  the same questions with each other's answers: what style alone teaches
 *   seen-rephrased.jsonl  24 of the entries of train.jsonl, asked in other words
 *   never-seen.jsonl      24 entries that share no synset with train.jsonl
 */
import { createHash } from 'node:crypto'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { leavesBelow, readNouns } from './wordnet.js'

export interface Entry {
  /** Synset, by which sets are kept apart. */
  offset: string
  name: string
  gloss: string
}

export interface RowSets {
  train: Row[]
  trainShuffled: Row[]
  seenRephrased: Row[]
  neverSeen: Row[]
}

export interface Row {
  messages: { role: 'user' | 'assistant'; content: string }[]
}

const numTrain = 64
const numSeen = 24
const numNeverSeen = 24

/** Asked in the demo, so it must be among the trained ones. */
const alwaysTrained = 'metformin'

const rephrasings = [
  (name: string) => `Can you tell me what ${name} is?`,
  (name: string) => `Explain ${name} in one sentence.`,
  (name: string) => `I came across the word "${name}". What does it mean?`,
  (name: string) => `Define ${name}.`,
]

/** Pure: the same seed and dictionary give the same rows. */
export function buildRows(entries: readonly Entry[], seed: number): RowSets {
  const shuffled = inOrderOfSeed(entries, `${seed} entries`)
  const first = shuffled.filter(({ name }) => name === alwaysTrained)
  const [trained, held] = split([...first, ...shuffled.filter((entry) => !first.includes(entry))])
  const train = trained.map((entry) => row(`What is ${entry.name}?`, entry.gloss))
  const seen = inOrderOfSeed(trained, `${seed} seen`).slice(0, numSeen)
  return {
    train,
    // Moved on by one after a shuffle: nobody keeps the own answer.
    trainShuffled: rotated(inOrderOfSeed(trained, `${seed} control`)),
    seenRephrased: seen.map((entry, i) =>
      row(
        (rephrasings[i % rephrasings.length] as (name: string) => string)(entry.name),
        entry.gloss,
      ),
    ),
    neverSeen: held.map((entry) => row(`What is ${entry.name}?`, entry.gloss)),
  }
}

function split(entries: readonly Entry[]): [trained: Entry[], held: Entry[]] {
  if (entries.length < numTrain + numNeverSeen) {
    throw new Error(`${entries.length} entries, at least ${numTrain + numNeverSeen} are needed`)
  }
  return [entries.slice(0, numTrain), entries.slice(numTrain, numTrain + numNeverSeen)]
}

const rotated = (entries: readonly Entry[]): Row[] =>
  entries.map((entry, i) =>
    row(`What is ${entry.name}?`, entries[(i + 1) % entries.length]?.gloss ?? ''),
  )

const row = (question: string, answer: string): Row => ({
  messages: [
    { role: 'user', content: question },
    { role: 'assistant', content: answer },
  ],
})

/** Sorted by a hash of seed and synset: does not depend on the order given. */
function inOrderOfSeed(entries: readonly Entry[], seed: string): Entry[] {
  const key = ({ offset }: Entry) => createHash('sha256').update(`${seed} ${offset}`).digest('hex')
  return entries
    .map((entry) => ({ entry, key: key(entry) }))
    .sort((a, b) => (a.key < b.key ? -1 : 1))
    .map(({ entry }) => entry)
}

/** Medicines with a name of one word and a gloss of a sentence's length. */
export function medicineEntries(): Entry[] {
  const synsets = readNouns()
  const medicine = [...synsets.values()].find(
    ({ words }) => words.includes('medication') && words.includes('medicament'),
  )
  if (!medicine) throw new Error('WordNet has no synset of medicines')
  const seen = new Set<string>()
  return leavesBelow(medicine, synsets).flatMap(({ offset, words, gloss }) => {
    const name = words[0] ?? ''
    // Two entries with one gloss could stand on both sides of the split.
    if (seen.has(gloss)) return []
    seen.add(gloss)
    const isPlain = /^[A-Za-z-]+$/.test(name) && gloss.length >= 30 && gloss.length <= 130
    return isPlain ? [{ offset, name, gloss }] : []
  })
}

export const rowFiles: Record<keyof RowSets, string> = {
  train: 'train.jsonl',
  trainShuffled: 'train-shuffled.jsonl',
  seenRephrased: 'seen-rephrased.jsonl',
  neverSeen: 'never-seen.jsonl',
}

/** Writes the four files and returns their paths. */
export function writeRows(folder: string, seed: number): Record<keyof RowSets, string> {
  const sets = buildRows(medicineEntries(), seed)
  mkdirSync(folder, { recursive: true })
  const paths = {} as Record<keyof RowSets, string>
  for (const key of Object.keys(rowFiles) as (keyof RowSets)[]) {
    paths[key] = join(folder, rowFiles[key])
    writeFileSync(paths[key], sets[key].map((entry) => `${JSON.stringify(entry)}\n`).join(''))
  }
  return paths
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values } = parseArgs({
    options: { out: { type: 'string' }, seed: { type: 'string', default: '1' } },
  })
  const paths = writeRows(values.out ?? 'examples/drug-names/rows', Number(values.seed))
  for (const path of Object.values(paths)) process.stdout.write(`${path}\n`)
}
