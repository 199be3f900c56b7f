/**
 * Slices leave while their lease is still computed. How often a run met what that makes possible: a
 * sum that counts an attempt whose worker has not said LeaseDone, or never does.
 */
import type { FromWorker } from '../../proto/gen/tunemesh/v1/FromWorker.js'
import type { LeaseKey } from '../../worker/run-events.js'

export class EarlySlices {
  readonly #leasesDone = new Set<string>()
  /** By fleet epoch and step: attempts that some finished sum counts. */
  readonly #counted = new Map<string, Set<string>>()

  constructor(private readonly count: (what: string) => void) {}

  noteSent({ leaseDone, sliceDone }: FromWorker): void {
    if (leaseDone) this.#leasesDone.add(attemptOf(leaseDone as LeaseKey))
    for (const { lease, leaseAttempt } of sliceDone?.counted ?? []) {
      const { fleetEpoch, step } = sliceDone as LeaseKey
      const attempt = attemptOf({ fleetEpoch, step, lease, leaseAttempt } as LeaseKey)
      if (!this.#leasesDone.has(attempt)) this.count('sum before LeaseDone')
      const key = `${fleetEpoch}/${step}`
      this.#counted.set(key, (this.#counted.get(key) ?? new Set()).add(attempt))
    }
  }

  noteCommit({ fleetEpoch, step }: Pick<LeaseKey, 'fleetEpoch' | 'step'>): void {
    for (const attempt of this.#counted.get(`${fleetEpoch}/${step}`) ?? []) {
      if (!this.#leasesDone.has(attempt)) this.count('commit with an attempt that died mid-lease')
    }
  }
}

const attemptOf = (key: LeaseKey): string =>
  `${key.fleetEpoch}/${key.step}/${key.lease}/${key.leaseAttempt}`
