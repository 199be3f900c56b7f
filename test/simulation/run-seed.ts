/** npx tsx test/simulation/run-seed.ts SEED [key=value…]: one seed again, with its whole trace. */
import { optionsFor } from './options.js'
import { World } from './world.js'

const [seedText, ...overrides] = process.argv.slice(2)
const options = optionsFor(
  Number(seedText ?? 1),
  Object.fromEntries(
    overrides.map((override) => {
      const [key, value] = override.split('=')
      return [key, Number.isNaN(Number(value)) ? value : Number(value)]
    }),
  ),
)
console.log(JSON.stringify(options, null, 2))
const world = new World(options)
world.isTracing = true
try {
  world.run()
  console.log(`ended at ${world.clock.nowMs.toFixed(0)} ms: ${JSON.stringify(world.outcome)}`)
} catch (error) {
  console.error(error)
  process.exitCode = 1
}
