/**
 * A benchmark whose measuring is native: its options, its program's rows (one JSON object a line)
 * and their table.
 */
import { spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { type Column, tableLine } from './table.js'

export interface NativeBench<Row> {
  /** In the native build folder. */
  program: string
  /** Options that go to the program, beside threads, path, rounds and only. */
  moreOptions?: string[]
  columns: Column<Row>[]
  /** Above the table, from its first row. */
  heading?(row: Row): string
  /** What the program does not know. */
  complete?(row: Row): Row
  /** Below the table. */
  summary?(rows: Row[]): string
}

/** Prints the table, or with `--json` the rows; answers the exit code. */
export async function runNativeBench<Row extends object>(bench: NativeBench<Row>): Promise<number> {
  const passedOn = ['threads', 'path', 'rounds', 'only', ...(bench.moreOptions ?? [])]
  const text = { type: 'string' } as const
  const { values } = parseArgs({
    options: {
      json: { type: 'boolean', default: false },
      program: text,
      ...Object.fromEntries(passedOn.map((name) => [name, text])),
    },
  }) as { values: Record<string, string | boolean | undefined> }
  const program = String(values.program ?? `build/native-cmake/${bench.program}`)
  if (!existsSync(program)) {
    console.error(`${program} is not there. Build it with: npm run build`)
    return 2
  }
  const args = passedOn.flatMap((name) =>
    typeof values[name] === 'string' ? [`--${name}`, values[name]] : [],
  )
  const rows: Row[] = []
  const code = await eachRow(program, args, (line) => {
    const row = bench.complete?.(JSON.parse(line) as Row) ?? (JSON.parse(line) as Row)
    rows.push(row)
    if (values.json) return console.log(JSON.stringify(row))
    if (rows.length === 1) {
      if (bench.heading) console.log(bench.heading(row))
      console.log(tableLine(bench.columns, ({ title }) => title))
    }
    console.log(tableLine(bench.columns, (column) => column.text(row)))
  })
  if (!values.json && bench.summary && rows.length > 0) console.log(bench.summary(rows))
  return code
}

async function eachRow(
  program: string,
  args: string[],
  onLine: (line: string) => void,
): Promise<number> {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] })
  const closed = new Promise<number>((resolve, reject) => {
    child.once('error', reject)
    child.once('close', (code) => resolve(code ?? 1))
  })
  for await (const line of createInterface({ input: child.stdout })) onLine(line)
  return closed
}
