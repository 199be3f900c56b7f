/** Rows of one file → tokens and labels; every bad row named, over-long ones by the policy. */
import { createHash } from 'node:crypto'
import { TunemeshError } from '../proto/errors.js'
import type { JobSpec } from '../proto/job-spec.js'
import { noTarget } from '../proto/pack-shard.js'
import type { RowFacts } from './loss-mask.js'
import { countShifted } from './packing.js'
import { type Row, type RowKind, readRows } from './rows.js'
import type { TokenizerPool } from './tokenizer-pool.js'
import type { RowResult } from './tokenizer-thread.js'

export interface IngestedRow {
  line: number
  ids: Int32Array
  labels: Int32Array
  /** Whether a token that ends a turn or the text is trained. */
  trainsStop: boolean
  facts: RowFacts
  /** Equal for equal rows. */
  contentHash: string
}

export interface IngestedFile {
  /** As the user gave it. */
  shown: string
  kind: RowKind
  rows: IngestedRow[]
  /** Rows read, used or not. */
  numRows: number
  numTruncated: number
  numDropped: number
  /** Tokens before truncation, of all rows that could be read. */
  lengths: number[]
  stopIds: Set<number>
}

export interface IngestOptions {
  path: string
  shown: string
  kind: JobSpec['kind']
  maxLength: number
  onLongRow: JobSpec['on_long_row']
  pool: TokenizerPool
  onProgress?: ((numRows: number) => void) | undefined
  signal?: AbortSignal | undefined
}

/** Rows of one message to a thread. */
const rowsPerBatch = 32
/** Bad rows that are listed; more are counted. */
const maxListedProblems = 100
/** 2^28 tokens are 2 GiB with their targets: what is held in memory at most. */
const maxTokens = 2 ** 28

/** @throws TunemeshError DATA_INVALID with every bad row, DATA_EMPTY */
export async function ingestRows(options: IngestOptions): Promise<IngestedFile> {
  const collected = new Collected(options)
  let batch: Row[] = []
  let inFlight: Promise<void>[] = []
  // Batches are tokenised side by side and kept in their order; the window bounds what waits.
  const flush = async () => {
    if (batch.length > 0) inFlight.push(collected.add(batch, options.pool))
    batch = []
    if (inFlight.length < 4 * options.pool.numThreads) return
    await Promise.all(inFlight)
    inFlight = []
    collected.throwIfFailed()
  }
  for await (const row of readRows(options.path, options.kind)) {
    options.signal?.throwIfAborted()
    if ('problem' in row) collected.addProblem(row.line, row.problem)
    else batch.push(row)
    if (batch.length === rowsPerBatch) await flush()
  }
  await flush()
  await Promise.all(inFlight)
  collected.throwIfFailed()
  return collected.finish()
}

class Collected {
  private readonly batches: { rows: Row[]; results: RowResult[] }[] = []
  private readonly problems: { line: number; text: string }[] = []
  private numRows = 0
  private numTokens = 0
  private failure: unknown = null

  constructor(private readonly options: IngestOptions) {}

  /** Keeps the place of the batch among the others. Never rejects: see `throwIfFailed`. */
  async add(rows: Row[], pool: TokenizerPool): Promise<void> {
    const place = { rows, results: [] as RowResult[] }
    this.batches.push(place)
    try {
      place.results = await pool.call('tokenizeRows', rows)
    } catch (error) {
      this.failure ??= error
      return
    }
    for (const result of place.results) if ('ids' in result) this.numTokens += result.ids.length
    this.numRows += rows.length
    this.options.onProgress?.(this.numRows)
  }

  throwIfFailed(): void {
    if (this.failure !== null) throw this.failure
    if (this.numTokens <= maxTokens) return
    throw new TunemeshError(
      'DATA_INVALID',
      `${this.options.shown} has more than ${maxTokens} tokens, the most a job takes. Split ` +
        `the file.`,
    )
  }

  addProblem(line: number, text: string): void {
    this.problems.push({ line, text })
  }

  finish(): IngestedFile {
    const { shown } = this.options
    const file: IngestedFile = {
      shown,
      kind: 'text',
      rows: [],
      numRows: 0,
      numTruncated: 0,
      numDropped: 0,
      lengths: [],
      stopIds: new Set(),
    }
    for (const { rows, results } of this.batches) {
      for (const [index, row] of rows.entries()) {
        file.numRows += 1
        file.kind = row.kind
        this.take(row, results[index] ?? { problem: 'was not tokenised.' }, file)
      }
    }
    if (this.problems.length > 0) throw this.badRows()
    if (file.rows.length > 0) return file
    const reason =
      file.numRows === 0
        ? 'has no rows. Add one JSON object a line.'
        : `has no rows left: all ${file.numDropped} are longer than max_length ` +
          `${this.options.maxLength}.`
    throw new TunemeshError('DATA_EMPTY', `${shown} ${reason}`)
  }

  private take(row: Row, result: RowResult, file: IngestedFile): void {
    if ('problem' in result) {
      this.addProblem(row.line, result.problem)
      return
    }
    const { maxLength, onLongRow } = this.options
    let { ids, labels } = result
    file.lengths.push(ids.length)
    if (ids.length > maxLength) {
      if (onLongRow === 'fail') {
        this.addProblem(
          row.line,
          `has ${ids.length} tokens, more than max_length ${maxLength}. ` +
            'Raise max_length, or set on_long_row to truncate or drop.',
        )
        return
      }
      if (onLongRow === 'drop') {
        file.numDropped += 1
        return
      }
      file.numTruncated += 1
      ids = ids.slice(0, maxLength)
      labels = labels.slice(0, maxLength)
    }
    if (countShifted(labels) === 0) {
      const wasCut = result.ids.length > maxLength
      this.addProblem(
        row.line,
        wasCut
          ? `is all prompt once it is cut to max_length ${maxLength}: its answer starts ` +
              `later. Drop it or raise max_length.`
          : 'is all prompt: no token of it would be trained.',
      )
      return
    }
    for (const id of result.stopIds) file.stopIds.add(id)
    const trainsStop = result.stopIds.some((id) => labels.includes(id))
    const contentHash = hashOf(ids, labels)
    file.rows.push({ line: row.line, ids, labels, trainsStop, facts: result.facts, contentHash })
  }

  private badRows(): TunemeshError {
    const sorted = [...this.problems].sort((a, b) => a.line - b.line)
    const lines = sorted
      .slice(0, maxListedProblems)
      .map(({ line, text }) => `${this.options.shown}:${line} ${text}`)
    const numMore = sorted.length - lines.length
    const [first = '', ...rest] = lines
    const details = rest.map((line) => `DATA_INVALID ${line}`)
    if (numMore > 0)
      details.push(`DATA_INVALID ${this.options.shown} has ${numMore} more bad rows.`)
    return new TunemeshError('DATA_INVALID', first, { details })
  }
}

const hashOf = (ids: Int32Array, labels: Int32Array): string =>
  createHash('sha1')
    .update(new Uint8Array(ids.buffer, ids.byteOffset, ids.byteLength))
    .update(Uint8Array.from(labels, (label) => (label === noTarget ? 0 : 1)))
    .digest('base64')

/**
 * Which of `numRows` rows are held out for validation: the same for the same seed, at least one,
 * and never all.
 */
export function heldOut(numRows: number, share: number, seed: number): Set<number> {
  const count = Math.min(numRows - 1, Math.max(1, Math.round(numRows * share)))
  const rank = Array.from({ length: numRows }, (_, row) => ({
    row,
    key: createHash('sha256').update(`validation ${seed} ${row}`).digest('hex'),
  }))
  rank.sort((a, b) => (a.key < b.key ? -1 : 1))
  return new Set(rank.slice(0, Math.max(0, count)).map(({ row }) => row))
}
