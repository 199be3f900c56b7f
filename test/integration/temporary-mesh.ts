/** A real embedded mesh on a folder of its own, and a job that trains in seconds. */
import { existsSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

export interface TemporaryFolder {
  stateDir: string
  outputDir: string
  jobPath: string
  remove(): void
}

/** @param settings lines that replace or follow those of the tiny job */
export function temporaryFolder(settings: Record<string, string | number> = {}): TemporaryFolder {
  const folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  const example = join(projectDir(), 'examples', 'tiny-llama')
  const outputDir = join(folder, 'output')
  const job: Record<string, string | number> = {
    model: example,
    data: join(example, 'rows.jsonl'),
    output_dir: outputDir,
    max_length: 128,
    gradient_accumulation_steps: 2,
    max_steps: 4,
    learning_rate: 0.005,
    ...settings,
  }
  const jobPath = join(folder, 'job.yaml')
  const lines = Object.entries(job).map(([key, value]) => `${key}: ${JSON.stringify(value)}\n`)
  writeFileSync(jobPath, lines.join(''))
  return {
    stateDir: join(folder, 'state'),
    outputDir,
    jobPath,
    remove: () => rmSync(folder, { recursive: true, force: true }),
  }
}

/** The folder of package.json, above test/ as above build/test/. */
export function projectDir(): string {
  let dir = dirname(fileURLToPath(import.meta.url))
  while (!existsSync(join(dir, 'package.json')) && dirname(dir) !== dir) dir = dirname(dir)
  return dir
}

/** null where the engine is not built: such a test cannot run. */
export const engineMissing = (): string | false =>
  existsSync(join(projectDir(), 'build', 'native', 'tunemesh.node')) ? false : 'no engine is built'
