/** Reads a job file: YAML and `--set` in, a JobSpec or every problem with its line out. */
import { isMap, isPair, isScalar, LineCounter, parseDocument, parse as parseYaml } from 'yaml'
import { TunemeshError } from './errors.js'
import { allowedValues } from './job-file-docs.js'
import {
  crossFieldProblems,
  foreignKeys,
  type JobKey,
  type JobSpec,
  jobKeys,
  jobSpecSchema,
} from './job-spec.js'

export interface JobFile {
  /** YAML text. */
  text: string
  /** For messages: "job.yaml". */
  fileName: string
  /** "key=value", each value a piece of YAML. */
  overrides?: readonly string[]
}

/** A job file is ten lines; this much is another file given by mistake. */
const maxJobFileBytes = 1 << 20

/** @throws TunemeshError JOB_INVALID: the first problem as message, the others as details */
export function readJobFile(file: JobFile): JobSpec {
  const problems: Problem[] = []
  const entries = new Map<string, Entry>()
  readYaml(file, entries, problems)
  for (const override of file.overrides ?? []) readOverride(override, entries, problems)
  const spec = validate(file, entries, problems)
  if (problems.length > 0 || !spec) throw jobInvalid(file, problems)
  return spec
}

/** Where each given key stands ("job.yaml:7"), for problems that show only later. */
export function keyPlaces(file: JobFile): Map<string, string> {
  const entries = new Map<string, Entry>()
  readYaml(file, entries, [])
  for (const override of file.overrides ?? []) readOverride(override, entries, [])
  return new Map([...entries].map(([key, { place }]) => [key, place]))
}

interface Entry {
  value: unknown
  /** "job.yaml:7" or "--set". */
  place: string
  order: number
}

interface Problem {
  place: string
  key: string
  message: string
  order: number
}

function readYaml(file: JobFile, entries: Map<string, Entry>, problems: Problem[]): void {
  const size = Buffer.byteLength(file.text)
  if (size > maxJobFileBytes) {
    const message = `the file has ${size} bytes, at most ${maxJobFileBytes}. Is it a job file?`
    problems.push({ place: `${file.fileName}:1`, key: '', message, order: 1 })
    return
  }
  const lineCounter = new LineCounter()
  const document = parseDocument(file.text.replace(/^\uFEFF/, ''), {
    lineCounter,
    prettyErrors: false,
  })
  for (const error of document.errors) {
    const line = lineCounter.linePos(error.pos[0]).line
    const message = `this is not valid YAML: ${firstLine(error.message)}`
    problems.push({ place: `${file.fileName}:${line}`, key: '', message, order: line })
  }
  const root = document.contents
  if (root === null || document.errors.length > 0) return
  if (!isMap(root)) {
    const message = 'a job file is a list of "key: value" lines'
    problems.push({ place: `${file.fileName}:1`, key: '', message, order: 1 })
    return
  }
  const values = document.toJS({ maxAliasCount: 100 }) as Record<string, unknown>
  for (const pair of root.items) {
    const node = isPair(pair) && isScalar(pair.key) ? pair.key : null
    const line = lineCounter.linePos(node?.range?.[0] ?? 0).line
    const key = String(node?.value ?? '')
    entries.set(key, { value: values[key], place: `${file.fileName}:${line}`, order: line })
  }
}

function readOverride(text: string, entries: Map<string, Entry>, problems: Problem[]): void {
  const order = Number.MAX_SAFE_INTEGER
  const equals = text.indexOf('=')
  if (equals <= 0) {
    const message = `"${text}" is not of the form key=value`
    problems.push({ place: '--set', key: '', message, order })
    return
  }
  const key = text.slice(0, equals).trim()
  try {
    entries.set(key, { value: parseYaml(text.slice(equals + 1)), place: '--set', order })
  } catch (error) {
    const message = `this is not valid YAML: ${firstLine((error as Error).message)}`
    problems.push({ place: '--set', key, message, order })
  }
}

function validate(
  file: JobFile,
  entries: Map<string, Entry>,
  problems: Problem[],
): JobSpec | undefined {
  const addProblem = (key: string, message: string) => {
    const { place, order } = entries.get(key) ?? { place: file.fileName, order: 0 }
    problems.push({ place, key, message, order })
  }
  const known: Record<string, unknown> = {}
  const misspelt = new Set<JobKey | undefined>()
  for (const [key, { value }] of entries) {
    if (Object.hasOwn(jobSpecSchema.shape, key)) known[key] = value
    else {
      misspelt.add(nearestKey(key))
      addProblem(key, unknownKey(key))
    }
  }
  if (problems.some(({ key }) => key === '')) return undefined
  const parsed = jobSpecSchema.safeParse(known)
  if (parsed.success) {
    for (const [key, message] of crossFieldProblems(parsed.data)) addProblem(key, message)
    return parsed.data
  }
  const reported = new Set<string>()
  for (const issue of parsed.error.issues) {
    const key = String(issue.path[0]) as JobKey
    if (reported.has(key)) continue
    reported.add(key)
    if (entries.has(key)) addProblem(key, describeIssue(key, known[key], issue.message))
    else if (!misspelt.has(key)) addProblem(key, missing(key))
  }
  return undefined
}

const nearestKey = (key: string): JobKey | undefined =>
  Object.hasOwn(foreignKeys, key) ? foreignKeys[key] : nearestName(key, jobKeys)

function unknownKey(key: string): string {
  const nearest = nearestKey(key)
  const hint = nearest ? `Did you mean ${nearest}?` : 'docs/job-file.md lists the keys.'
  return `there is no such key. ${hint}`
}

const missing = (key: JobKey): string =>
  `required but not given. Add a line "${key}: ` +
  `${key === 'model' ? 'path/to/model' : 'rows.jsonl'}".`

/** The value seen, and what may stand there; a reason only where the schema gives its own. */
function describeIssue(key: JobKey, value: unknown, reason: string): string {
  const seen = JSON.stringify(value) ?? String(value)
  const shown = seen.length > 60 ? `${seen.slice(0, 57)}...` : seen
  const isOwnReason = !/^(Invalid|Too |Unrecognized)/.test(reason)
  return `${shown} is not allowed${isOwnReason ? `: ${reason}` : ''}. Use ${allowedValues(key)}.`
}

function jobInvalid(file: JobFile, problems: Problem[]): TunemeshError {
  const lines = [...problems]
    .sort((a, b) => a.order - b.order)
    .map(({ place, key, message }) => `${place} ${key === '' ? '' : `${key}: `}${message}`)
  const [first = `${file.fileName} is invalid`, ...rest] = lines
  return new TunemeshError('JOB_INVALID', first, {
    details: rest.map((line) => `JOB_INVALID ${line}`),
  })
}

/** The name at the least edit distance, where that is less than half of the word. */
export function nearestName<Name extends string>(
  word: string,
  names: readonly Name[],
): Name | undefined {
  const limit = Math.max(2, Math.floor(word.length * 0.4))
  let best: { name: Name; distance: number } | undefined
  for (const name of names) {
    const distance = editDistance(word.toLowerCase(), name.toLowerCase())
    if (distance <= limit && distance < (best?.distance ?? Infinity)) best = { name, distance }
  }
  return best?.name
}

/** Levenshtein's distance. */
function editDistance(a: string, b: string): number {
  let previous = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i += 1) {
    const row = [i]
    for (let j = 1; j <= b.length; j += 1) {
      const replaced = (previous[j - 1] ?? 0) + (a[i - 1] === b[j - 1] ? 0 : 1)
      row.push(Math.min(replaced, (previous[j] ?? 0) + 1, (row[j - 1] ?? 0) + 1))
    }
    previous = row
  }
  return previous[b.length] ?? 0
}

const firstLine = (text: string): string => text.split('\n', 1)[0] ?? ''
