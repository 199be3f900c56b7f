/** Who computes and who adds: leases sized by measured speed, slices spread evenly. */

/** A worker as planning sees it. */
export interface PlannedWorker {
  workerId: string
  /** Micro-batches per millisecond; 0: not yet measured. */
  speed: number
}

export interface PlannedLease {
  workerId: string
  microBatches: number[]
}

/**
 * One lease a worker, in proportion to speed (largest remainder), consecutive micro-batches.
 * A worker not yet measured counts as the mean of the others. Who gets what never changes any bit.
 */
export function planLeases(
  microBatches: readonly number[],
  workers: readonly PlannedWorker[],
): PlannedLease[] {
  const measured = workers.filter((worker) => worker.speed > 0)
  const meanSpeed =
    measured.length > 0
      ? measured.reduce((sum, worker) => sum + worker.speed, 0) / measured.length
      : 1
  const counts = shareOut(
    microBatches.length,
    workers.map((worker) => (worker.speed > 0 ? worker.speed : meanSpeed)),
  )
  const leases: PlannedLease[] = []
  let next = 0
  workers.forEach((worker, index) => {
    const count = counts[index] as number
    if (count > 0) {
      leases.push({
        workerId: worker.workerId,
        microBatches: microBatches.slice(next, next + count),
      })
    }
    next += count
  })
  return leases
}

/**
 * Splits `total` in proportion to the weights: largest remainder, earlier entries first on a tie.
 */
function shareOut(total: number, weights: readonly number[]): number[] {
  const sum = weights.reduce((a, b) => a + b, 0)
  const exact = weights.map((weight) => (total * weight) / sum)
  const counts = exact.map(Math.floor)
  const byRemainder = exact
    .map((value, index) => ({ index, remainder: value - Math.floor(value) }))
    .sort((a, b) => b.remainder - a.remainder || a.index - b.index)
  let left = total - counts.reduce((a, b) => a + b, 0)
  for (const { index } of byRemainder) {
    if (left === 0) break
    counts[index] = (counts[index] as number) + 1
    left--
  }
  return counts
}

/** Owner of each slice, slice 0 first: round robin, so that counts differ by at most one. */
export const planOwners = (numSlices: number, workerIds: readonly string[]): string[] =>
  Array.from({ length: numSlices }, (_, slice) => workerIds[slice % workerIds.length] as string)

/** The id with the smallest load, the first of equals. */
export function leastLoaded(workerIds: readonly string[], loadOf: (id: string) => number): string {
  return workerIds.reduce((best, id) => (loadOf(id) < loadOf(best) ? id : best))
}
