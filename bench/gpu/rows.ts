/** A row of the GPU benchmark: what is trained, and how it is named. */
import type { Work } from './limits.js'

export interface Row extends Work {
  name: string
  /** fp8: the frozen base of LoRA. */
  precision: 'bf16' | 'fp32' | 'fp8'
}

const modelNames: Record<string, string> = {
  '8b': 'llama-8b',
  '3b': 'llama-3b',
  '1b': 'llama-1b',
  qwen7b: 'qwen2.5-7b',
  '135m': 'smollm2-135m',
  '5m': 'tiny-5m',
}

/** Every row that has a figure to reach, the most important first: `--rows all`. */
const targetRows = [
  '8b-lora-4x2048',
  '3b-full-4x512',
  '135m-lora-8x512',
  '135m-full-8x512',
  '8b-lora-8x2048',
  '1b-full-8x2048',
  '3b-lora-8x2048',
  '8b-lora-2x4096',
  '8b-lora-4x512',
  '8b-full-4x512',
  'qwen7b-full-16x1024',
  '5m-lora-8x256',
  '5m-full-8x256',
  '8b-lora-4x2048-fp8',
]

export const parseRows = (list: string): Row[] =>
  (list === 'all' ? targetRows : list.split(',')).map(parseRow)

/** `8b-lora-4x2048`, with `-fp32` or `-fp8` behind where it is not bf16. */
export function parseRow(name: string): Row {
  const found = /^([a-z0-9]+)-(lora|full)-([1-9]\d*)x([1-9]\d*)(?:-(fp32|fp8))?$/.exec(name)
  const model = modelNames[found?.[1] ?? '']
  if (found === null || model === undefined)
    throw new RangeError(
      `the row "${name}" is not MODEL-METHOD-BATCHxSEQ[-fp32|-fp8] with a model of ` +
        `${Object.keys(modelNames).join(', ')} and the method lora or full.`,
    )
  const precision = (found[5] ?? 'bf16') as Row['precision']
  if (precision === 'fp8' && found[2] === 'full')
    throw new RangeError(`the row "${name}": fp8 is for the frozen base of lora.`)
  return {
    name,
    model,
    method: found[2] as Row['method'],
    batch: Number(found[3]),
    seq: Number(found[4]),
    precision,
  }
}

/** From single flags. */
export function rowOf(flags: Record<string, string | undefined>): Row {
  const missing = ['model', 'method', 'batch', 'seq'].filter((name) => flags[name] === undefined)
  if (missing.length > 0)
    throw new RangeError(
      `--${missing.join(', --')} not given. Name rows by --rows 8b-lora-4x2048,3b-full-4x512 (` +
        'all: those with a figure to reach), or one by --model, --method, --batch and --seq.',
    )
  const short = Object.entries(modelNames).find(([, model]) => model === flags.model)?.[0]
  const { precision = 'bf16' } = flags
  const suffix = precision === 'bf16' ? '' : `-${precision}`
  const name = `${short ?? flags.model}-${flags.method}-${flags.batch}x${flags.seq}${suffix}`
  return parseRow(name)
}
