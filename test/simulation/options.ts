/** What a seed decides: size of the job, fleet, faults. Printed whole when a run fails. */
import { Random } from './random.js'

type Mode = 'safety' | 'liveness'

/** Deliberate breakages that the invariants must catch. */
export type Mutation =
  | 'none'
  | 'countTwice'
  | 'skipFencing'
  | 'trustUnverifiedSums'
  | 'announceBeforeAck'
  | 'forgetLease'
  | 'compareInFreeMode'

export interface Faults {
  loss: number
  duplication: number
  reordering: number
  unknownAppend: number
  /** Mean time between faults of each kind; 0: never. */
  crashWorkerMs: number
  pauseWorkerMs: number
  breakStreamMs: number
  crashCoordinatorMs: number
  takeOverMs: number
  stopNatsMs: number
  joinMs: number
  drainMs: number
  diskFullMs: number
  stopJobMs: number
}

export interface SimulationOptions {
  seed: number
  mode: Mode
  mutation: Mutation
  numWorkers: number
  mostWorkers: number
  numSlices: number
  microBatchesPerStep: number
  packsPerMicroBatch: number
  numPacks: number
  numEpochs: number
  checkpointEverySteps: number
  evaluateEverySteps: number
  numContributionSlots: number
  maxGradNorm: number
  deviceClasses: string[]
  /** Free mode: nothing that is computed twice has the same bits. */
  isFree: boolean
  /** Step and micro-batch whose gradient is not finite, under the option `skip`; null: none. */
  nonFinite: { step: number; microBatch: number } | null
  /** Where every device fails, unless it checks each operation; null: nowhere. */
  deviceFault: { step: number; microBatch: number } | null
  /** Faults happen until then. */
  faultsUntilMs: number
  /** A live run must end so soon after the last fault. */
  endWithinMs: number
  faults: Faults
}

const noFaults: Faults = {
  loss: 0,
  duplication: 0,
  reordering: 0,
  unknownAppend: 0,
  crashWorkerMs: 0,
  pauseWorkerMs: 0,
  breakStreamMs: 0,
  crashCoordinatorMs: 0,
  takeOverMs: 0,
  stopNatsMs: 0,
  joinMs: 0,
  drainMs: 0,
  diskFullMs: 0,
  stopJobMs: 0,
}

export function optionsFor(
  seed: number,
  overrides: Partial<SimulationOptions> = {},
): SimulationOptions {
  const random = new Random(seed)
  const mode: Mode = random.chance(0.25) ? 'safety' : 'liveness'
  const numWorkers = random.integer(1, 4)
  const microBatchesPerStep = random.integer(1, 7)
  const often = (probability: number, low: number, high: number) =>
    random.chance(probability) ? random.between(low, high) : 0
  const isCalm = random.chance(0.1)
  const faults: Faults = isCalm
    ? noFaults
    : {
        loss: random.chance(0.6) ? random.between(0, 0.2) : 0,
        duplication: random.chance(0.6) ? random.between(0, 0.2) : 0,
        reordering: random.chance(0.6) ? random.between(0, 0.5) : 0,
        unknownAppend: random.chance(0.5) ? random.between(0, 0.3) : 0,
        crashWorkerMs: often(0.6, 150, 2_000),
        pauseWorkerMs: often(0.4, 200, 2_000),
        breakStreamMs: often(0.4, 150, 2_000),
        crashCoordinatorMs: often(0.4, 300, 3_000),
        takeOverMs: often(0.3, 300, 3_000),
        stopNatsMs: often(0.3, 300, 3_000),
        joinMs: often(0.5, 100, 1_000),
        drainMs: often(0.35, 200, 2_000),
        diskFullMs: often(0.2, 300, 2_000),
        stopJobMs: often(0.15, 300, 3_000),
      }
  const options: SimulationOptions = {
    seed,
    mode,
    mutation: 'none',
    numWorkers,
    mostWorkers: numWorkers + random.integer(0, 3),
    numSlices: random.integer(1, 6),
    microBatchesPerStep,
    packsPerMicroBatch: random.integer(1, 3),
    numPacks: random.integer(1, 60),
    numEpochs: random.integer(1, 2),
    checkpointEverySteps: random.pick([0, 1, 2, 3, 5]),
    evaluateEverySteps: random.pick([0, 0, 2]),
    numContributionSlots: random.integer(1, 4),
    maxGradNorm: random.pick([0, 1]),
    deviceClasses: random.chance(0.12) ? ['cpu-a', 'cpu-b'] : ['cpu-a'],
    isFree: false,
    nonFinite: random.chance(0.08) ? { step: random.integer(1, 4), microBatch: 0 } : null,
    deviceFault: null,
    faultsUntilMs: isCalm ? 0 : random.between(1_000, 6_000),
    endWithinMs: 60_000,
    faults,
  }
  if (random.chance(0.15)) {
    options.deviceFault = {
      step: random.integer(1, 4),
      microBatch: random.integer(0, microBatchesPerStep - 1),
    }
  }
  options.isFree = random.chance(0.15)
  // A job whose only step is skipped must fail.
  const numPacksAStep = microBatchesPerStep * options.packsPerMicroBatch
  if (options.numPacks * options.numEpochs <= numPacksAStep) options.nonFinite = null
  return { ...options, ...overrides }
}
