/** Seeded runs of the real machines; a failure prints its seed and every option. */
import assert from 'node:assert/strict'
import { test } from 'node:test'
import { type Mutation, optionsFor, type SimulationOptions } from './options.js'
import { World } from './world.js'

const numSeeds = 400

test('simulation: 400 seeds of faults end in the weights of the undisturbed run', () => {
  const counts = new Map<string, number>()
  for (let seed = 1; seed <= numSeeds; seed++) {
    const world = new World(optionsFor(seed))
    try {
      world.run()
    } catch (error) {
      const options = JSON.stringify(optionsFor(seed))
      assert.fail(
        `seed ${seed}: ${error instanceof Error ? error.message : error}\n${options}\n` +
          `again: npx tsx test/simulation/run-seed.ts ${seed}`,
      )
    }
    for (const [what, count] of world.counts) counts.set(what, (counts.get(what) ?? 0) + count)
  }
  const met = ['slice moved', 'lease computed again', 'epoch join', 'epoch drain', 'fenced']
  met.push('pause', 'stopped', 'skip', 'rollback', 'worker loadState', 'worker readCommitLog')
  met.push(
    'rollback in free mode',
    'device failure',
    'sum before LeaseDone',
    'commit with an attempt that died mid-lease',
  )
  for (const what of met) assert.ok((counts.get(what) ?? 0) > 0, `no seed meets: ${what}`)
})

/** Found among thousands: rollbacks beside checkpoints, evaluations, late sums and lost states. */
const rollbackSeeds = {
  free: [549, 655, 932, 1001, 1633, 1775, 1904, 2343, 2504],
  mixed: [286, 396, 546, 812, 1420, 1844, 2112, 2401],
}
test('simulation: seeds whose rollbacks once went wrong end well', () => {
  const check = (seed: number, overrides: Partial<SimulationOptions>) => {
    try {
      new World(optionsFor(seed, overrides)).run()
    } catch (error) {
      assert.fail(`seed ${seed} with ${JSON.stringify(overrides)}: ${error}`)
    }
  }
  for (const seed of rollbackSeeds.free) check(seed, { isFree: true })
  const mixed = { isFree: false, deviceClasses: ['cpu-a', 'cpu-b'] }
  for (const seed of rollbackSeeds.mixed) check(seed, mixed)
})

for (const mutation of [
  'countTwice',
  'skipFencing',
  'announceBeforeAck',
  'forgetLease',
  'trustUnverifiedSums',
  'compareInFreeMode',
] satisfies Mutation[]) {
  test(`simulation: the invariants catch the breakage ${mutation}`, () => {
    for (let seed = 1; seed <= numSeeds; seed++) {
      try {
        new World(optionsFor(seed, { mutation })).run()
      } catch {
        return
      }
    }
    assert.fail(`${numSeeds} seeds run with ${mutation} and no invariant breaks`)
  })
}
