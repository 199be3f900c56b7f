/** Learning rates of a run, by the formulas of transformers' get_scheduler. */
import { type JobSpec, peakLearningRate } from '../proto/job-spec.js'

/** Learning rate of each step, the first one first: with warm-up it is 0, as in transformers. */
export function learningRates(spec: JobSpec, numSteps: number): number[] {
  const numWarmup = spec.warmup_steps || Math.ceil(numSteps * spec.warmup_ratio)
  const peak = peakLearningRate(spec)
  return Array.from(
    { length: numSteps },
    (_, step) => peak * shareOfPeak(spec.lr_scheduler_type, { step, numWarmup, numSteps }),
  )
}

interface Place {
  /** From 0. */
  step: number
  numWarmup: number
  numSteps: number
}

function shareOfPeak(type: JobSpec['lr_scheduler_type'], place: Place): number {
  const { step, numWarmup, numSteps } = place
  if (type === 'constant') return 1
  if (step < numWarmup) return step / numWarmup
  if (type === 'constant_with_warmup') return 1
  const numAfter = Math.max(1, numSteps - numWarmup)
  if (type === 'linear') return Math.max(0, (numSteps - step) / numAfter)
  return Math.max(0, 0.5 * (1 + Math.cos((Math.PI * (step - numWarmup)) / numAfter)))
}
