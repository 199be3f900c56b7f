/** What python3 with torch measures in the same call: the card's ceilings and the peers' steps. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { type Ceilings, modelShapes } from './limits.js'
import type { Row } from './rows.js'

/** Packages that the machine's python3 may lack, from wheels that were carried here. */
export class PeerPackages {
  /** Holds a folder for each of the two kinds of peers; null: nothing was carried. */
  readonly folder: string | null
  readonly #env: NodeJS.ProcessEnv

  /** @throws RangeError where the folder has no wheels, or they can not be unpacked */
  constructor(wheelsDir: string | undefined, env: NodeJS.ProcessEnv) {
    this.folder = wheelsDir === undefined ? null : unpackWheels(wheelsDir)
    this.#env = {
      ...env,
      // What the peers' own guides advise; kernels compiled once serve the next row.
      PYTORCH_ALLOC_CONF: env.PYTORCH_ALLOC_CONF ?? 'expandable_segments:True',
      TORCHINDUCTOR_CACHE_DIR:
        env.TORCHINDUCTOR_CACHE_DIR ?? join(tmpdir(), 'tunemesh-bench-inductor'),
    }
  }

  /** torchtune wants older packages than transformers and peft accept beside them. */
  envFor(script: string): NodeJS.ProcessEnv {
    if (this.folder === null) return this.#env
    const own = join(this.folder, script.startsWith('torchtune') ? 'torchtune' : 'liger')
    const paths = [own, this.#env.PYTHONPATH].filter((path) => path)
    return { ...this.#env, PYTHONPATH: paths.join(':') }
  }

  remove(): void {
    if (this.folder !== null) rmSync(this.folder, { recursive: true, force: true })
  }
}

/** A wheel is a zip archive of packages: python3 itself unpacks it, pip or not. */
function unpackWheels(wheelsDir: string): string {
  const wheels = existsSync(wheelsDir)
    ? readdirSync(wheelsDir).filter((file) => file.endsWith('.whl'))
    : []
  if (wheels.length === 0) throw new RangeError(`--wheels ${wheelsDir} has no file *.whl`)
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-bench-wheels-'))
  for (const wheel of wheels) {
    const own = join(folder, wheel.startsWith('liger_kernel-') ? 'liger' : 'torchtune')
    const args = ['-m', 'zipfile', '-e', join(wheelsDir, wheel), own]
    const done = spawnSync('python3', args, { encoding: 'utf8' })
    if (done.status === 0) continue
    rmSync(folder, { recursive: true, force: true })
    throw new RangeError(`${wheel} can not be unpacked: ${lastLine(done.stderr)}`)
  }
  return folder
}

/** Null where python3 has no torch that sees a card. */
export function torchDevice(): string | null {
  const script =
    'import torch, transformers, peft\n' +
    'print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'
  const done = spawnSync('python3', ['-c', script], { encoding: 'utf8' })
  const device = done.status === 0 ? done.stdout.trim() : ''
  return device === '' ? null : device
}

export interface PeerRuns {
  scriptsDir: string
  packages: PeerPackages
  /** Of one script: a peer that compiles may take longer than a call has. */
  limitSeconds: number
}

export async function measureCeilings(runs: PeerRuns, rows: Row[]): Promise<Ceilings | null> {
  const points = new Set(
    rows.map(({ model, seq }) => `${(modelShapes[model]?.headSize ?? 0) > 64 ? 128 : 64},${seq}`),
  )
  const call = ['ceilings.py', ...points]
  return lastJson(await runScript({ ...runs, limitSeconds: ceilingsSeconds }, call)) as Ceilings
}

/** They take about ten seconds and two more for each shape of attention. */
const ceilingsSeconds = 180

export interface PeerResult {
  peer: string
  tokensPerSecond: number
  peakGib: number
}

/** All that ran within their time, the fastest first. */
export async function runPeers(
  runs: PeerRuns,
  row: Row,
  variants: string[],
): Promise<PeerResult[]> {
  const results: PeerResult[] = []
  for (const call of peerCalls(row, variants)) {
    const found = lastJson(await runScript(runs, call)) as {
      peer: string
      tokens_per_second: number
      peak_gib: number
    } | null
    if (found === null) continue
    const { peer, tokens_per_second: tokensPerSecond, peak_gib: peakGib } = found
    console.log(
      `  ${peer}: ${Math.round(tokensPerSecond).toLocaleString('en')} tok/s, ` +
        `${peakGib.toFixed(1)} GiB`,
    )
    results.push({ peer, tokensPerSecond, peakGib })
  }
  return results.sort((a, b) => b.tokensPerSecond - a.tokensPerSecond)
}

/** Script and arguments of each; none for what no peer trains. */
export function peerCalls(row: Row, variants: string[]): string[][] {
  const sizes = [String(row.batch), String(row.seq)]
  if (['smollm2-135m', 'tiny-5m'].includes(row.model)) {
    const dtype = row.precision === 'fp32' ? 'float32' : 'bfloat16'
    return [['small_step.py', row.model, row.method, ...sizes, dtype]]
  }
  if (row.precision === 'fp32') return []
  return variants.flatMap((variant) => {
    if (variant !== 'torchtune')
      return [['trainer_step.py', row.model, row.method, ...sizes, variant]]
    const isBuilt = row.method === 'lora' && row.model.startsWith('llama-')
    return isBuilt ? [['torchtune_step.py', row.model, ...sizes]] : []
  })
}

/** A peer that fails or takes too long says so on the error output; others go on. */
function runScript(
  { scriptsDir, packages, limitSeconds }: PeerRuns,
  call: string[],
): Promise<string> {
  const [script = '', ...args] = call
  const what = call.join(' ')
  // A group of its own: compilers and data loaders are processes too, and hold the card's memory.
  const child = spawn('python3', [`${scriptsDir}${script}`, ...args], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: packages.envFor(script),
    detached: true,
  })
  let [told, errors] = ['', '']
  child.stdout.on('data', (data: Buffer) => {
    told = (told + String(data)).slice(-maxTold)
  })
  child.stderr.on('data', (data: Buffer) => {
    errors = (errors + String(data)).slice(-maxTold)
  })
  const start = performance.now()
  return new Promise((resolve) => {
    let isLate = false
    const timer = setTimeout(() => {
      isLate = true
      endGroup(child)
    }, limitSeconds * 1e3)
    child.once('error', (error) => {
      errors = error.message
    })
    child.once('close', (code) => {
      clearTimeout(timer)
      endGroup(child)
      const seconds = ((performance.now() - start) / 1e3).toFixed(0)
      if (isLate) console.error(`  ${what} did not end in ${limitSeconds} s and was stopped`)
      else if (code !== 0) console.error(`  ${what} failed after ${seconds} s: ${lastLine(errors)}`)
      resolve(code === 0 ? told : '')
    })
  })
}

const maxTold = 1 << 16

function endGroup(child: ChildProcess): void {
  try {
    if (child.pid !== undefined) process.kill(-child.pid, 'SIGKILL')
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
  }
}

const lastLine = (text: string | null) => (text ?? '').trim().split('\n').at(-1) ?? ''

function lastJson(text: string): unknown {
  const line = text
    .trim()
    .split('\n')
    .filter((part) => part.startsWith('{'))
    .at(-1)
  return line === undefined ? null : JSON.parse(line)
}
