/** What is said about a job's rows before it takes a device. */
import type { LengthBucket__Output } from '../proto/gen/tunemesh/v1/LengthBucket.js'
import type { PreflightReport__Output } from '../proto/gen/tunemesh/v1/PreflightReport.js'
import type { RenderedSample__Output } from '../proto/gen/tunemesh/v1/RenderedSample.js'
import { noTarget } from '../proto/pack-shard.js'
import type { IngestedFile, IngestedRow } from './ingest-rows.js'
import type { PreparedDataset, TokenizerInfo } from './prepared-job.js'

export interface PreflightInput {
  trainFile: IngestedFile
  trainRows: readonly IngestedRow[]
  validationRows: readonly IngestedRow[]
  train: PreparedDataset
  tokenizer: TokenizerInfo
  maxLength: number
  samples: RenderedSample__Output[]
}

export function preflightReport(input: PreflightInput): PreflightReport__Output {
  const { trainFile, trainRows, validationRows, train } = input
  return {
    numRows: trainFile.numRows,
    numUsedRows: trainRows.length,
    numTokens: train.numTokens,
    numTargetTokens: train.numTargetTokens,
    numPacks: train.numPacks,
    numValidationRows: validationRows.length,
    numTruncatedRows: trainFile.numTruncated,
    numDroppedRows: trainFile.numDropped,
    histogram: histogramOf(trainFile.lengths),
    stopTokenTrained: trainRows.every((row) => row.trainsStop),
    samples: input.samples,
    findings: findingsOf(input),
    kind: trainFile.kind,
  }
}

/** Row lengths in buckets that double, from the shortest that holds a row to the longest. */
function histogramOf(lengths: readonly number[]): LengthBucket__Output[] {
  const counts = new Map<number, number>()
  for (const length of lengths) {
    const upTo = 2 ** Math.max(3, Math.ceil(Math.log2(length)))
    counts.set(upTo, (counts.get(upTo) ?? 0) + 1)
  }
  const bounds = [...counts.keys()]
  const buckets: LengthBucket__Output[] = []
  for (let upTo = Math.min(...bounds); upTo <= Math.max(...bounds); upTo *= 2) {
    buckets.push({ upToTokens: upTo, numRows: counts.get(upTo) ?? 0 })
  }
  return buckets
}

function findingsOf(input: PreflightInput): string[] {
  const { trainFile, trainRows, validationRows, tokenizer, maxLength } = input
  const findings: string[] = []
  const find = (rows: readonly IngestedRow[], text: (which: string) => string) => {
    const [first] = rows
    if (!first) return
    findings.push(text(`${countOf(rows.length)} (first: ${trainFile.shown}:${first.line})`))
  }
  const cut = trainFile.numTruncated
  if (cut > 0) findings.push(`Cut to max_length ${maxLength}, the end lost: ${countOf(cut)}.`)
  const dropped = trainFile.numDropped
  if (dropped > 0)
    findings.push(`Dropped, longer than max_length ${maxLength}: ${countOf(dropped)}.`)
  find(
    trainRows.filter((row) => !row.trainsStop),
    (which) => `No end token is trained in ${which}: the model may not learn to stop.`,
  )
  find(
    trainRows.filter((row) => row.facts.hasDoubleBos),
    (which) =>
      `The start token stands twice in ${which}. Leave it out of the text or the template.`,
  )
  find(
    trainRows.filter((row) => row.facts.hasSharedToken),
    (which) => `Prompt and answer share a token, which is trained, in ${which}.`,
  )
  find(
    trainRows.filter((row) => row.facts.hasControlText),
    (which) => `Words are read as control tokens in ${which}.`,
  )
  const seen = new Set<string>()
  find(
    trainRows.filter((row) => seen.has(row.contentHash) || !seen.add(row.contentHash)),
    (which) => `An earlier row is repeated in ${which}.`,
  )
  const leaked = validationRows.filter((row) => seen.has(row.contentHash)).length
  if (leaked > 0) {
    findings.push(
      `Of ${countOf(validationRows.length)} for validation ${leaked} also stand in training.`,
    )
  }
  if (tokenizer.padId !== null && tokenizer.stopIds.includes(tokenizer.padId)) {
    findings.push(
      `The pad token is also an end token (id ${tokenizer.padId}). Harmless here: filling is ` +
        `masked by position.`,
    )
  }
  if (trainFile.kind === 'prompt_completion' && tokenizer.chatTemplate !== null) {
    findings.push(
      'Rows of kind prompt_completion do not use the chat template. For a chat model give ' +
        'rows of kind messages.',
    )
  }
  return findings
}

const countOf = (count: number): string => (count === 1 ? '1 row' : `${count} rows`)

/** Runs of trained and untrained tokens. */
export function spansOf(row: IngestedRow): { ids: number[]; trained: boolean }[] {
  const spans: { ids: number[]; trained: boolean }[] = []
  for (const [index, id] of row.ids.entries()) {
    const trained = row.labels[index] !== noTarget
    const last = spans.at(-1)
    if (last?.trained === trained) last.ids.push(id)
    else spans.push({ ids: [id], trained })
  }
  return spans
}
