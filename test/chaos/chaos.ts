/**
 * npm run chaos [-- WORD…]: every kill of chaos-cases.ts, a line each; exit status 1 if any
 * fails.
 */
import { chaosCases } from './chaos-cases.js'
import { problemsOf, runCase } from './chaos-run.js'

const words = process.argv.slice(2)
const chosen = chaosCases.filter(
  ({ name }) => words.length === 0 || words.some((word) => name.includes(word)),
)

const undisturbed = await runCase({ name: 'undisturbed', lives: [{}], failpoints: [] })
const wanted = undisturbed.weightsSha256
let numFailed = undisturbed.state === 'SUCCEEDED' ? 0 : 1
say('undisturbed', undisturbed.seconds, `${undisturbed.state} ${undisturbed.error} ${wanted}`)

for (const chaos of chosen) {
  const outcome = await runCase(chaos)
  const problems = problemsOf(chaos, outcome, wanted)
  const reached = `reached ${outcome.reached.length} times`
  const kills = chaos.killNats ? 'nats-server killed' : reached
  const text = `${outcome.state}, ${kills}, weights equal`
  say(chaos.name, outcome.seconds, problems.length === 0 ? text : `FAILED: ${problems.join('; ')}`)
  numFailed += problems.length === 0 ? 0 : 1
}
console.log(`${chosen.length + 1 - numFailed} passed, ${numFailed} failed`)
process.exit(numFailed === 0 ? 0 : 1)

function say(name: string, seconds: number, text: string): void {
  console.log(`${name.padEnd(44)} ${seconds.toFixed(1).padStart(6)} s  ${text}`)
}
