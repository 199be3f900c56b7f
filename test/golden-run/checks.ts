/** One line of a golden run: what was compared, the error reached, the limit. */
export interface Check {
  folder: string
  name: string
  /** NaN where the check is not a number's. */
  error: number
  limit: number
  outcome: 'ok' | 'FAILED' | 'skipped'
  note: string
}

export class CheckList {
  readonly checks: Check[] = []

  constructor(
    readonly folder: string,
    private readonly onCheck: (check: Check) => void,
  ) {}

  /** Passes where `error` is a number not above `limit`: NaN fails. */
  within(name: string, error: number, limit: number, note = ''): void {
    this.#add({ name, error, limit, outcome: error <= limit ? 'ok' : 'FAILED', note })
  }

  equal(name: string, isEqual: boolean, note = ''): void {
    this.#add({
      name,
      error: Number.NaN,
      limit: Number.NaN,
      outcome: isEqual ? 'ok' : 'FAILED',
      note,
    })
  }

  skipped(name: string, note: string): void {
    this.#add({ name, error: Number.NaN, limit: Number.NaN, outcome: 'skipped', note })
  }

  failed(name: string, note: string): void {
    this.#add({ name, error: Number.NaN, limit: Number.NaN, outcome: 'FAILED', note })
  }

  #add(check: Omit<Check, 'folder'>): void {
    const whole = { folder: this.folder, ...check }
    this.checks.push(whole)
    this.onCheck(whole)
  }
}

export function maxAbsDifference(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) return Number.NaN
  let most = 0
  for (let i = 0; i < a.length; i++) {
    const difference = Math.abs((a[i] as number) - (b[i] as number))
    if (!(difference <= most)) most = difference
  }
  return most
}

/** 1 − cosine, and how far ‖a‖ is from ‖b‖; both 0 where both vanish. */
export function directionErrors(a: ArrayLike<number>, b: ArrayLike<number>) {
  if (a.length !== b.length) return { cosine: Number.NaN, norm: Number.NaN }
  let product = 0
  let aSize = 0
  let bSize = 0
  for (let i = 0; i < a.length; i++) {
    product += (a[i] as number) * (b[i] as number)
    aSize += (a[i] as number) ** 2
    bSize += (b[i] as number) ** 2
  }
  if (aSize === 0 && bSize === 0) return { cosine: 0, norm: 0 }
  const cosine = 1 - product / Math.sqrt(aSize * bSize)
  return { cosine, norm: Math.abs(Math.sqrt(aSize / bSize) - 1) }
}

/** ‖a − b‖ / ‖b‖, in float64; 0 where both vanish. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const { difference, size } = norms(a, b)
  return size === 0 ? difference : difference / size
}

export function norms(a: ArrayLike<number>, b: ArrayLike<number>) {
  if (a.length !== b.length) return { difference: Number.NaN, size: Number.NaN }
  let difference = 0
  let size = 0
  for (let i = 0; i < a.length; i++) {
    difference += ((a[i] as number) - (b[i] as number)) ** 2
    size += (b[i] as number) ** 2
  }
  return { difference: Math.sqrt(difference), size: Math.sqrt(size) }
}
