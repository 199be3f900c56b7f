/** How files of a model or an adapter are told to a machine that may or may not have them. */
import type { Stats } from 'node:fs'

export interface ModelFile {
  /** Without a folder. */
  name: string
  /** "sha256:<hex>"; empty: usable only in place, by a worker of this machine. */
  digest: string
  sizeBytes: number
  /** Of the file that the coordinator has read (`fileStamp`). */
  stamp: string
}

/**
 * Size, time and inode. Where a path has the stamp that the coordinator saw there, it is the same
 * file of the same disk, and need not be hashed again.
 */
export const fileStamp = ({ size, mtimeMs, ino }: Pick<Stats, 'size' | 'mtimeMs' | 'ino'>) =>
  `${size}-${mtimeMs}-${ino}`

/** Model files that belong beside trained weights, so that the folder is complete. */
export const companionFiles: ReadonlySet<string> = new Set([
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'chat_template.jinja',
  'merges.txt',
])
