/**
 * npm run chaos [-- WORD…]: every kill of chaos-cases.ts, a line each; exit status 1 if any
 * fails.
 */
import { chaosCases } from './chaos-cases.js'
import { problemsOf, runCase, UndisturbedRuns } from './chaos-run.js'
import { networkCases } from './network-cases.js'

const words = process.argv.slice(2)
const isChosen = (name: string) => words.length === 0 || words.some((word) => name.includes(word))
const chosen = chaosCases.filter(({ name }) => isChosen(name))

const undisturbed = new UndisturbedRuns()
let numFailed = 0
for (const hasPoisonedRow of new Set(chosen.map((chaos) => chaos.hasPoisonedRow))) {
  const outcome = await undisturbed.outcomeFor(hasPoisonedRow ? { hasPoisonedRow } : {})
  const { state, error, weightsSha256, seconds } = outcome
  const name = hasPoisonedRow ? 'undisturbed, with a poisoned row' : 'undisturbed'
  say(name, seconds, `${state} ${error} ${weightsSha256}`)
  numFailed += state === 'SUCCEEDED' ? 0 : 1
}

for (const chaos of chosen) {
  const outcome = await runCase(chaos)
  const { weightsSha256 } = await undisturbed.outcomeFor(chaos)
  const problems = problemsOf(chaos, outcome, weightsSha256)
  const reached = `reached ${outcome.reached.length} times`
  const kills = chaos.killNats ? 'nats-server killed' : reached
  const text = `${outcome.state}, ${kills}, weights equal`
  say(chaos.name, outcome.seconds, problems.length === 0 ? text : `FAILED: ${problems.join('; ')}`)
  numFailed += problems.length === 0 ? 0 : 1
}
const chosenNetwork = networkCases.filter(({ name }) => isChosen(name))
for (const { name, missing, run } of chosenNetwork) {
  const startedMs = performance.now()
  const reason = missing()
  if (reason) {
    console.log(`${name.padEnd(44)}           skipped: ${reason}`)
    continue
  }
  const text = await run().catch((error: unknown) => {
    numFailed++
    return `FAILED: ${error instanceof Error ? error.message : String(error)}`
  })
  say(name, (performance.now() - startedMs) / 1000, text)
}
console.log(`${chosen.length + chosenNetwork.length} cases, ${numFailed} failed`)
process.exit(numFailed === 0 ? 0 : 1)

function say(name: string, seconds: number, text: string): void {
  console.log(`${name.padEnd(44)} ${seconds.toFixed(1).padStart(6)} s  ${text}`)
}
