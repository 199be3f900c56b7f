/** Exponential moving average without the bias of its start; holes stay holes. Pure. */

/**
 * @param weight of the past, from 0 (raw) to below 1
 * @returns at each finite value the debiased mean of all finite values so far; null elsewhere
 */
export function smoothed(values: readonly (number | null)[], weight: number): (number | null)[] {
  if (weight <= 0) return [...values]
  let sum = 0
  let mass = 0
  return values.map((value) => {
    if (value === null || !Number.isFinite(value)) return null
    sum = weight * sum + (1 - weight) * value
    mass = weight * mass + (1 - weight)
    return sum / mass
  })
}
