/**
 * The tokenizer of the model that answers, in a thread of its own: a chat asks again and again,
 * and reading a vocabulary takes longer than an answer's first token.
 */
import { TokenizerPool } from './tokenizer-pool.js'

interface Kept {
  modelPath: string
  pool: TokenizerPool
  numUsers: number
}

/** One model's at a time: the last one asked for. */
let kept: Kept | null = null

/** For the time of one answer; release() it. */
export interface BorrowedTokenizer {
  pool: TokenizerPool
  release(): void
}

export async function borrowTokenizer(modelPath: string): Promise<BorrowedTokenizer> {
  if (kept?.modelPath !== modelPath) {
    const previous = kept
    kept = { modelPath, pool: new TokenizerPool({ modelPath }, 1), numUsers: 0 }
    if (previous) closeUnused(previous)
  }
  const borrowed = kept
  borrowed.numUsers += 1
  const release = () => {
    borrowed.numUsers -= 1
    closeUnused(borrowed)
  }
  try {
    await borrowed.pool.call('describe')
    return { pool: borrowed.pool, release }
  } catch (error) {
    // Not kept: the files may be mended before the next question.
    if (kept === borrowed) kept = null
    release()
    throw error
  }
}

function closeUnused(tokenizer: Kept): void {
  if (tokenizer.numUsers === 0 && tokenizer !== kept) void tokenizer.pool.close()
}
