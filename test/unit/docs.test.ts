import assert from 'node:assert/strict'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { describe, test } from 'node:test'
import { pathToFileURL } from 'node:url'
import { errorKinds } from '../../proto/errors.js'
import { jobFileDocs } from '../../proto/job-file-docs.js'
import { projectTop } from '../project-top.js'

const read = (path: string): string => readFileSync(join(projectTop, path), 'utf8')

describe('documentation', () => {
  test('docs/job-file.md is what the schema of the job file gives', async () => {
    const script = pathToFileURL(join(projectTop, 'scripts/docs.mjs')).href
    const { jobFilePage } = (await import(script)) as { jobFilePage(table: string): string }
    assert.equal(read('docs/job-file.md'), jobFilePage(jobFileDocs()))
  })

  test('every error code stands in docs/errors.md, and no other', () => {
    const told = [...read('docs/errors.md').matchAll(/^\| `([A-Z][A-Z0-9_]+)` \|/gm)]
    assert.deepEqual(told.map((match) => match[1]).sort(), Object.keys(errorKinds).sort())
  })

  test('every dependency stands in docs/dependencies.md', () => {
    const { dependencies, devDependencies } = JSON.parse(read('package.json'))
    const page = read('docs/dependencies.md')
    // @types/x only describes x.
    const names = Object.keys({ ...dependencies, ...devDependencies }).filter(
      (name) => !name.startsWith('@types/'),
    )
    assert.deepEqual(
      names.filter((name) => !page.includes(`\`${name}\``)),
      [],
    )
  })

  test('each word of the glossary that is written as code occurs in the code', () => {
    const terms = [...read('docs/glossary.md').matchAll(/^\| ([^|]+) \|/gm)]
      .slice(1)
      .flatMap((match) => (match[1] ?? '').split(/[,/]/))
      .map((term) => term.trim())
      .filter((term) => /^[a-z]+[A-Z]/.test(term))
    const sources = ['coordinator', 'worker', 'proto'].flatMap((folder) =>
      readdirSync(join(projectTop, folder))
        .filter((name) => name.endsWith('.ts'))
        .map((name) => read(join(folder, name))),
    )
    assert.ok(terms.length >= 4)
    assert.deepEqual(
      terms.filter((term) => !sources.some((text) => text.includes(term))),
      [],
    )
  })

  test('relative links of all pages lead to files', () => {
    const pages = [
      ...['README.md', 'ARCHITECTURE.md', 'CONTRIBUTING.md', 'proto/PROTOCOL.md'],
      ...pagesIn('docs'),
      ...pagesIn('docs/decisions'),
      ...pagesIn('examples'),
      ...pagesIn('examples/tiny-llama'),
      ...pagesIn('examples/drug-names'),
      ...pagesIn('examples/clients'),
    ]
    const broken = pages.flatMap((page) =>
      [...read(page).matchAll(/\]\(([^)#\s]+)[^)]*\)/g)]
        .map((match) => match[1] ?? '')
        .filter((link) => !/^[a-z]+:/.test(link))
        .filter((link) => !existsSync(join(projectTop, dirname(page), link)))
        .map((link) => `${page}: ${link}`),
    )
    assert.deepEqual(broken, [])
  })

  test('files that ARCHITECTURE.md names exist', () => {
    const named = [...read('ARCHITECTURE.md').matchAll(/`([a-z-]+\/[\w./-]+\.\w+)`/g)]
    const missing = named.map((match) => match[1] ?? '').filter((path) => !existsInTree(path))
    assert.ok(named.length > 20)
    assert.deepEqual(missing, [])
  })
})

const pagesIn = (folder: string): string[] =>
  readdirSync(join(projectTop, folder))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `${folder}/${name}`)

/** What a build or a run makes is named too, and is not there in a fresh clone. */
const existsInTree = (path: string): boolean =>
  path.startsWith('build/') || existsSync(join(projectTop, path))
