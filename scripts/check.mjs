// npm run check: types, lint and format, dead code, import directions, size ratchets, C++ format,
// error table.
import { spawnSync } from 'node:child_process'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { firstLine, run, runTool, top } from './tools.mjs'

/** Who may import whom, by top folder. What is not listed may not. */
const mayImport = {
  proto: ['proto'],
  coordinator: ['coordinator', 'proto'],
  worker: ['worker', 'client', 'proto'],
  client: ['client', 'proto'],
  cli: ['cli', 'client', 'proto'],
  dashboard: ['dashboard', 'proto'],
  bench: ['bench', 'examples', 'client', 'worker', 'coordinator', 'proto'],
  test: [
    'test',
    'cli',
    'client',
    'worker',
    'coordinator',
    'proto',
    'dashboard',
    'bench',
    'examples',
  ],
  examples: ['examples', 'client', 'proto'],
}
const budgets = { lines: 400, kernelLines: 600, columns: 100, functionLines: 70 }

function filesBelow(dir, pattern) {
  const found = []
  for (const entry of readdirSync(join(top, dir), { withFileTypes: true })) {
    const path = `${dir}/${entry.name}`
    if (path === 'proto/gen' || path === 'test/golden' || entry.name === 'node_modules') continue
    if (entry.isDirectory()) found.push(...filesBelow(path, pattern))
    else if (pattern.test(entry.name)) found.push(path)
  }
  return found
}

const folders = [...Object.keys(mayImport), 'native', 'scripts']
const sources = folders.flatMap((dir) => filesBelow(dir, /\.(ts|tsx|mjs|cc|h|cu|cuh)$/))

function checkImports() {
  const problems = []
  for (const file of sources.filter((name) => /\.tsx?$/.test(name))) {
    const from = file.split('/')[0]
    const text = readFileSync(join(top, file), 'utf8')
    for (const [statement, target] of text.matchAll(
      /^(?:import|export)\b[^;'"]*?from\s+'(\.[^']+)'/gm,
    )) {
      const to = join(file, '..', target).split('/')[0]
      const typeOnly = /^(import|export) type/.test(statement)
      if (!mayImport[from]?.includes(to))
        problems.push(`${file} imports ${target}: ${from} may not import ${to}`)
      else if (from === 'dashboard' && to === 'proto' && !typeOnly)
        problems.push(`${file} imports ${target}: the dashboard takes only types from proto`)
    }
    if (
      /\bprocess\.env\b/.test(text) &&
      !/(^|\/)(main|demo|vite\.config)\.ts$/.test(file) &&
      !/^(test|bench)\//.test(file)
    )
      problems.push(`${file} reads process.env: only the file a process starts with does`)
  }
  for (const file of sources.filter((name) => name.startsWith('native/'))) {
    for (const [, target] of readFileSync(join(top, file), 'utf8').matchAll(
      /^#include "([^"]+)"/gm,
    )) {
      const rank = (path) =>
        ['kernels', 'engine', 'bindings'].indexOf(path.replace('native/', '').split('/')[0])
      const to = target.includes('/') ? rank(target) : rank(file)
      if (to > rank(file))
        problems.push(`${file} includes ${target}: native imports go bindings → engine → kernels`)
    }
  }
  return problems
}

/**
 * Lines of each function, by brace depth: good enough for a budget, and the same for every language
 * here.
 */
function longFunctions(lines) {
  const found = []
  const open = []
  let depth = 0
  lines.forEach((line, index) => {
    const code = line.replace(/\/\/.*|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`/g, '')
    const startsFunction =
      /(\)|=>|noexcept|const|override)[^;(){}]*\{\s*$/.test(code) &&
      !/^\s*(\}|if|for|while|switch|else|do|try|catch|describe|test|it)\b/.test(code)
    for (const character of code) {
      if (character === '{') {
        depth += 1
        open.push({ depth, index, isFunction: startsFunction })
      } else if (character === '}') {
        const block = open.pop()
        depth -= 1
        if (block?.isFunction && index - block.index + 1 > budgets.functionLines)
          found.push({ line: block.index + 1, length: index - block.index + 1 })
      }
    }
  })
  return found
}

/**
 * What is over a budget, one line each; scripts/size-ratchet.json lists what is allowed to be, with
 * its reason.
 */
function overBudget() {
  const over = {}
  for (const file of sources) {
    const lines = readFileSync(join(top, file), 'utf8').split('\n')
    const limit = file.startsWith('native/kernels') ? budgets.kernelLines : budgets.lines
    if (lines.length - 1 > limit) over[`${file} lines`] = lines.length - 1
    const wide = lines.filter((line) => line.length > budgets.columns).length
    if (wide > 0) over[`${file} wide`] = wide
    const long = longFunctions(lines)
    if (long.length > 0) over[`${file} functions`] = long.length
    if (file.split('/').length > 4) over[`${file} depth`] = file.split('/').length
  }
  return over
}

function checkSizes() {
  const allowed = JSON.parse(readFileSync(join(top, 'scripts/size-ratchet.json'), 'utf8'))
  const over = overBudget()
  if (process.argv.includes('--print-sizes')) console.log(JSON.stringify(over, null, 2))
  const problems = []
  for (const [name, value] of Object.entries(over)) {
    const entry = allowed[name]
    if (!entry)
      problems.push(
        `${name}: ${value} is over its budget (split it, or say why in scripts/size-ratchet.json)`,
      )
    else if (value > entry.most)
      problems.push(`${name}: ${value}, was ${entry.most}: the number over never grows`)
  }
  for (const name of Object.keys(allowed))
    if (!(name in over))
      problems.push(`${name} is within its budget now: take it out of scripts/size-ratchet.json`)
  return problems
}

function checkErrorDocs() {
  const codes = [
    ...readFileSync(join(top, 'proto/errors.ts'), 'utf8').matchAll(/^ {2}([A-Z][A-Z0-9_]+):/gm),
  ].map((m) => m[1])
  const docs = readFileSync(join(top, 'docs/errors.md'), 'utf8')
  return codes
    .filter((code) => !docs.includes(`\`${code}\``))
    .map((code) => `docs/errors.md lacks ${code}`)
}

function formatNative() {
  if (firstLine('clang-format', ['--version']) === null) {
    console.log('  skipped: clang-format is not on this machine')
    return []
  }
  const files = sources.filter((name) => /\.(cc|h|cu|cuh)$/.test(name))
  const done = spawnSync('clang-format', ['--dry-run', '--Werror', ...files], {
    cwd: top,
    encoding: 'utf8',
  })
  return done.status === 0
    ? []
    : [
        done.stderr
          .split('\n')
          .filter((line) => line.includes('error:'))
          .slice(0, 5)
          .join('\n'),
      ]
}

const bin = (name) => join(top, 'node_modules', name)
function tool(args) {
  try {
    run(process.execPath, args)
    return []
  } catch {
    return [`${args[0].replace(top, '')} found problems`]
  }
}

const checks = {
  types: () => tool([bin('typescript/bin/tsc'), '-p', '.', '--noEmit']),
  'dashboard types': () => tool([bin('typescript/bin/tsc'), '-p', 'dashboard', '--noEmit']),
  'lint and format': () =>
    tool([bin('@biomejs/biome/bin/biome'), 'check', '.', '--max-diagnostics=40']),
  'dead code': () => tool([bin('knip/bin/knip.js')]),
  imports: checkImports,
  sizes: checkSizes,
  'error docs': checkErrorDocs,
  'C++ format': formatNative,
}

await runTool(() => {
  const only = process.argv.slice(2).filter((name) => !name.startsWith('--'))
  let failed = 0
  for (const [name, check] of Object.entries(checks)) {
    if (only.length > 0 && !only.includes(name)) continue
    const problems = check()
    console.log(`${problems.length === 0 ? 'ok    ' : 'FAILED'} ${name}`)
    for (const problem of problems) console.log(`  ${problem}`)
    failed += problems.length === 0 ? 0 : 1
  }
  process.exitCode = failed === 0 ? 0 : 1
})
