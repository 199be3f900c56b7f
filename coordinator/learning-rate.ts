/**
 * Learning rate of each step, computed once in float64: the formulas of Hugging Face's
 * `transformers.optimization.get_scheduler`. The first update uses the schedule at 0.
 */
type LearningRateSchedule = 'constant' | 'constant_with_warmup' | 'linear' | 'cosine'

export interface LearningRateOptions {
  schedule: LearningRateSchedule
  learningRate: number
  numSteps: number
  /** Wins over the ratio where it is above 0. */
  warmupSteps: number
  warmupRatio: number
}

/** Step 1 first. */
export function learningRateTable(options: LearningRateOptions): number[] {
  const { schedule, learningRate, numSteps } = options
  const warmup = numWarmupSteps(options)
  return Array.from(
    { length: numSteps },
    (_, done) => learningRate * factor(schedule, done, { warmup, numSteps }),
  )
}

const numWarmupSteps = (
  options: Pick<LearningRateOptions, 'numSteps' | 'warmupSteps' | 'warmupRatio'>,
): number =>
  options.warmupSteps > 0 ? options.warmupSteps : Math.ceil(options.numSteps * options.warmupRatio)

function factor(
  schedule: LearningRateSchedule,
  done: number,
  { warmup, numSteps }: { warmup: number; numSteps: number },
): number {
  if (schedule === 'constant') return 1
  if (done < warmup) return done / Math.max(1, warmup)
  if (schedule === 'constant_with_warmup') return 1
  const remaining = Math.max(1, numSteps - warmup)
  if (schedule === 'linear') return Math.max(0, (numSteps - done) / remaining)
  return Math.max(0, 0.5 * (1 + Math.cos((Math.PI * (done - warmup)) / remaining)))
}
