/** `npm run bench -- NAME [--json] …`: each benchmark is a program of its own beside this file. */
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const dir = fileURLToPath(new URL('.', import.meta.url))
const names = readdirSync(dir)
  .filter((file) => file.endsWith('.js') && file !== 'bench.js')
  .map((file) => file.slice(0, -3))

const [name, ...rest] = process.argv.slice(2)
if (name === undefined || !names.includes(name)) {
  console.error(
    name === undefined ? 'Which benchmark?' : `No benchmark "${name}".`,
    `There are: ${names.join(', ')}`,
  )
  process.exit(2)
}
const done = spawnSync(process.execPath, [`${dir}${name}.js`, ...rest], { stdio: 'inherit' })
process.exit(done.status ?? 1)
