/** Learns byte-level BPE (Sennrich et al. 2016, bytes as in GPT-2) from a few texts. */

export interface BpeOptions {
  /** Control tokens, which get the first ids. */
  firstTokens: string[]
  vocabSize: number
}

export interface Bpe {
  vocab: Record<string, number>
  merges: [string, string][]
}

/** GPT-2's pre-tokenizer: a word takes the space before it along. */
const wordPattern = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu

export function learnBpe(texts: readonly string[], options: BpeOptions): Bpe {
  const letters = byteLetters()
  const tokens = [...options.firstTokens, ...[...letters].sort()]
  const words = countWords(texts, letters)
  const merges: [string, string][] = []
  while (tokens.length < options.vocabSize) {
    const pair = mostFrequentPair(words)
    if (!pair) break
    merges.push(pair)
    tokens.push(pair.join(''))
    for (const word of words) word.pieces = merged(word.pieces, pair)
  }
  return { vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges }
}

/** A printable character for each byte, as in GPT-2: bytes that print stand for themselves. */
function byteLetters(): string[] {
  let next = 256
  return Array.from({ length: 256 }, (_, byte) => {
    const prints =
      (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || (byte >= 174 && byte <= 255)
    if (prints) return String.fromCharCode(byte)
    next += 1
    return String.fromCharCode(next - 1)
  })
}

interface Word {
  pieces: string[]
  count: number
}

function countWords(texts: readonly string[], letters: string[]): Word[] {
  const counts = new Map<string, number>()
  for (const text of texts) {
    for (const word of text.match(wordPattern) ?? []) counts.set(word, (counts.get(word) ?? 0) + 1)
  }
  return [...counts].map(([word, count]) => ({
    pieces: [...Buffer.from(word)].map((byte) => letters[byte] ?? ''),
    count,
  }))
}

/** Ties go to the pair that sorts first: the result does not depend on the order of words. */
function mostFrequentPair(words: readonly Word[]): [string, string] | undefined {
  const counts = new Map<string, number>()
  for (const { pieces, count } of words) {
    for (let i = 1; i < pieces.length; i += 1) {
      const pair = `${pieces[i - 1]} ${pieces[i]}`
      counts.set(pair, (counts.get(pair) ?? 0) + count)
    }
  }
  let best: { pair: string; count: number } | undefined
  for (const [pair, count] of counts) {
    const isBetter = count > (best?.count ?? 1) || (count === best?.count && pair < best.pair)
    if (isBetter) best = { pair, count }
  }
  const [left, right] = best?.pair.split(' ') ?? []
  return left !== undefined && right !== undefined ? [left, right] : undefined
}

function merged(pieces: readonly string[], [left, right]: [string, string]): string[] {
  const result: string[] = []
  for (let i = 0; i < pieces.length; i += 1) {
    const isPair = pieces[i] === left && pieces[i + 1] === right
    result.push(isPair ? left + right : (pieces[i] ?? ''))
    if (isPair) i += 1
  }
  return result
}
