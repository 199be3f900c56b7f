// Writes docs/job-file.md from the schema in proto/job-spec.ts, out of build/. --check only
// compares.
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { top } from './tools.mjs'

const path = join(top, 'docs/job-file.md')

/** The page's text around the table that the schema gives. */
export const jobFilePage = (table) => `# The job file

Written by \`node scripts/docs.mjs\` from \`proto/job-spec.ts\`: change it there.

A job file is YAML with flat keys. \`model\` and \`data\` are required. Relative paths start at the
folder of the job file. Names are those of Hugging Face TrainingArguments, PEFT LoraConfig and TRL
SFTConfig. An unknown key is refused, and the nearest known one named; all problems of a file are
told at once. \`--set key=value\` overrides a key, and may be given several times.

${table}
What \`plan\` says of a job file: its rows, packs, optimizer steps and memory; nothing is trained.
`

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const built = pathToFileURL(join(top, 'build/proto/job-file-docs.js')).href
  const { jobFileDocs } = await import(built)
  const page = jobFilePage(jobFileDocs())
  if (!process.argv.includes('--check')) writeFileSync(path, page)
  else if (readFileSync(path, 'utf8') !== page) {
    console.error(
      'docs/job-file.md is not what proto/job-spec.ts gives. Run: node scripts/docs.mjs',
    )
    process.exitCode = 1
  }
}
