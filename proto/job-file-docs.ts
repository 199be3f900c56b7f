/** What the schema of the job file says, in words: for docs/job-file.md and for messages. */
import { z } from 'zod'
import { type JobKey, jobKeys, jobSpecSchema } from './job-spec.js'

interface DocumentedKey {
  default?: unknown
  description?: string
  type?: string
  enum?: unknown[]
  const?: unknown
  minimum?: number
  maximum?: number
  exclusiveMinimum?: number
  exclusiveMaximum?: number
  anyOf?: DocumentedKey[]
  items?: DocumentedKey
}

/** docs/job-file.md's table. */
export function jobFileDocs(): string {
  const rows = jobKeys.map((key) => {
    const entry = documented(key)
    const fallback = 'default' in entry ? `\`${JSON.stringify(entry.default)}\`` : 'required'
    return `| \`${key}\` | ${valuesOf(entry)} | ${fallback} | ${entry.description ?? ''} |`
  })
  return ['| key | values | default | meaning |', '|---|---|---|---|', ...rows, ''].join('\n')
}

/** "integer from 1 to 1024", for messages. */
export const allowedValues = (key: JobKey): string => valuesOf(documented(key))

function documented(key: JobKey): DocumentedKey {
  const schema = z.toJSONSchema(jobSpecSchema, { io: 'input' })
  return (schema.properties?.[key] ?? {}) as DocumentedKey
}

function valuesOf(entry: DocumentedKey): string {
  if (entry.anyOf) return entry.anyOf.map(valuesOf).join(' or ')
  if (entry.enum) return entry.enum.map(String).join(', ')
  if (entry.const !== undefined) return String(entry.const)
  if (entry.type === 'array') return `a list of ${valuesOf(entry.items ?? {})}`
  if (entry.type === 'boolean') return 'true or false'
  if (entry.type === 'object') return 'a map of names to paths'
  if (entry.type !== 'number' && entry.type !== 'integer') return entry.type ?? 'any value'
  const above = entry.exclusiveMinimum === undefined ? 'from' : 'above'
  const below = entry.exclusiveMaximum === undefined ? 'to' : 'below'
  const low = entry.minimum ?? entry.exclusiveMinimum ?? 0
  const high = entry.maximum ?? entry.exclusiveMaximum ?? 0
  return `${entry.type} ${above} ${low} ${below} ${high}`
}
