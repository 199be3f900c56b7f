/** A row of the GPU benchmark: what is trained, and how it is named. */
import type { Work } from './limits.js'

export interface Row extends Work {
  name: string
  precision: 'bf16' | 'fp32'
}

const modelNames: Record<string, string> = {
  '8b': 'llama-8b',
  '3b': 'llama-3b',
  '1b': 'llama-1b',
  qwen7b: 'qwen2.5-7b',
  '135m': 'smollm2-135m',
  '5m': 'tiny-5m',
}

/** `8b-lora-4x2048`, with `-fp32` behind where it is not bf16. */
export function parseRow(name: string): Row {
  const found = /^([a-z0-9]+)-(lora|full)-([1-9]\d*)x([1-9]\d*)(-fp32)?$/.exec(name)
  const model = modelNames[found?.[1] ?? '']
  if (found === null || model === undefined)
    throw new RangeError(
      `the row "${name}" is not MODEL-METHOD-BATCHxSEQ[-fp32] with a model of ` +
        `${Object.keys(modelNames).join(', ')} and the method lora or full.`,
    )
  return {
    name,
    model,
    method: found[2] as Row['method'],
    batch: Number(found[3]),
    seq: Number(found[4]),
    precision: found[5] === undefined ? 'bf16' : 'fp32',
  }
}

/** From single flags. */
export function rowOf(flags: Record<string, string | undefined>): Row {
  const missing = ['model', 'method', 'batch', 'seq'].filter((name) => flags[name] === undefined)
  if (missing.length > 0)
    throw new RangeError(
      `--${missing.join(', --')} not given. Name rows by --rows 8b-lora-4x2048,3b-full-4x512, or ` +
        'one by --model, --method, --batch and --seq.',
    )
  const short = Object.entries(modelNames).find(([, model]) => model === flags.model)?.[0]
  const suffix = flags.precision === 'fp32' ? '-fp32' : ''
  const name = `${short ?? flags.model}-${flags.method}-${flags.batch}x${flags.seq}${suffix}`
  return parseRow(name)
}
