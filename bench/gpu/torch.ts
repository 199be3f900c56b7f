/** What python3 with torch measures in the same call: the card's ceilings and the peers' steps. */
import { spawnSync } from 'node:child_process'
import { type Ceilings, modelShapes } from './limits.js'
import type { Row } from './rows.js'

/** Null where python3 has no torch that sees a card: why goes to the error output once. */
export function torchDevice(): string | null {
  const script =
    'import torch, transformers, peft\n' +
    'print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
  const done = spawnSync('python3', ['-c', script], { encoding: 'utf8' })
  const device = done.status === 0 ? done.stdout.trim() : ''
  return device === '' ? null : device
}

export function measureCeilings(peersDir: string, rows: Row[]): Ceilings | null {
  const points = new Set(
    rows.map(({ model, seq }) => `${(modelShapes[model]?.headSize ?? 0) > 64 ? 128 : 64},${seq}`),
  )
  return lastJson(run([`${peersDir}ceilings.py`, ...points])) as Ceilings | null
}

export interface PeerResult {
  peer: string
  tokensPerSecond: number
  peakGib: number
}

/** The fastest of the peers that ran; null where none did. */
export function bestPeer(peersDir: string, row: Row, variants: string[]): PeerResult | null {
  const results = peerCalls(row, variants).flatMap(([script = '', ...args]) => {
    const found = lastJson(run([`${peersDir}${script}`, ...args])) as {
      peer: string
      tokens_per_second: number
      peak_gib: number
    } | null
    if (found === null) return []
    return [{ peer: found.peer, tokensPerSecond: found.tokens_per_second, peakGib: found.peak_gib }]
  })
  return results.sort((a, b) => b.tokensPerSecond - a.tokensPerSecond)[0] ?? null
}

/** Script and arguments of each; none for what no peer trains. */
function peerCalls(row: Row, variants: string[]): string[][] {
  const sizes = [String(row.batch), String(row.seq)]
  if (['smollm2-135m', 'tiny-5m'].includes(row.model)) {
    const dtype = row.precision === 'bf16' ? 'bfloat16' : 'float32'
    return [['small_step.py', row.model, row.method, ...sizes, dtype]]
  }
  if (row.model === 'qwen2.5-7b' || row.precision === 'fp32') return []
  return variants.flatMap((variant) => {
    if (variant !== 'torchtune')
      return [['trainer_step.py', row.model, row.method, ...sizes, variant]]
    return row.method === 'lora' ? [['torchtune_step.py', row.model, ...sizes]] : []
  })
}

/** A peer that fails says so on the error output; its row is then without a peer. */
function run(args: string[]): string {
  const done = spawnSync('python3', args, { encoding: 'utf8', maxBuffer: 1 << 26 })
  if (done.status === 0) return done.stdout
  console.error(`${args.join(' ')} failed: ${(done.stderr ?? '').trim().split('\n').at(-1)}`)
  return ''
}

function lastJson(text: string): unknown {
  const line = text
    .trim()
    .split('\n')
    .filter((part) => part.startsWith('{'))
    .at(-1)
  return line === undefined ? null : JSON.parse(line)
}
