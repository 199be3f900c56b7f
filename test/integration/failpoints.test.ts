/** A handful of the kills that `npm run chaos` tries all of; which ones, the printed seed says. */
import assert from 'node:assert/strict'
import { randomInt } from 'node:crypto'
import { describe, it } from 'node:test'
import { type ChaosCase, chaosCases } from '../chaos/chaos-cases.js'
import { problemsOf, runCase, UndisturbedRuns } from '../chaos/chaos-run.js'

const numChosen = 5
const seed = Number(process.env.TUNEMESH_SEED ?? randomInt(2 ** 31))

/** Without repetition, the same for the same seed; one of each sort of process is among them. */
function choose(): ChaosCase[] {
  let state = seed >>> 0
  const pick = (cases: readonly ChaosCase[]) => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return cases[(state >>> 8) % cases.length] as ChaosCase
  }
  const named = (prefix: string) => chaosCases.filter(({ name }) => name.startsWith(prefix))
  const chosen = new Set(
    ['worker.', 'coordinator.', 'nats-server'].map((sort) => pick(named(sort))),
  )
  while (chosen.size < numChosen) chosen.add(pick(chaosCases))
  return [...chosen]
}

describe(`kill -9 (TUNEMESH_SEED=${seed})`, () => {
  const undisturbed = new UndisturbedRuns()

  for (const chaos of choose()) {
    it(`${chaos.name}: the job ends with the undisturbed weights`, async () => {
      const { state, error, weightsSha256 } = await undisturbed.outcomeFor(chaos)
      assert.equal(state, 'SUCCEEDED', error)
      assert.deepEqual(problemsOf(chaos, await runCase(chaos), weightsSha256), [])
    })
  }
})
