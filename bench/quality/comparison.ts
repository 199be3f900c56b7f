/** Losses of the same training in several precisions, seed by seed. Pure. */

export type Precision = 'fp32' | 'bf16' | 'fp8'

/** One training, as the file has it: a line each. */
export interface QualityRow {
  data: string
  precision: Precision
  seed: number
  model: string
  steps: number
  /** Packs of a step, and tokens of a pack. */
  batch: number
  max_length: number
  learning_rate: number
  held_out_rows: number
  /** Mean of the last steps' losses, each a mean over the step's target tokens. */
  last_loss: number
  last_steps: number
  /** On rows that are not trained, before the first step and after the last. */
  held_out_before: number
  held_out_loss: number
  seconds: number
  device: string
  date: string
  commit: string | null
}

/** What each precision is held against, and by how much it may differ. */
const comparedWith: Partial<Record<Precision, Precision>> = { bf16: 'fp32', fp8: 'bf16' }
export const limitPercent = 0.5

/** Two rows of one key are one and the same training. */
export const keyOf = (row: RunKey): string =>
  [row.data, row.precision, row.seed, row.model, row.steps, row.batch]
    .concat([row.max_length, row.learning_rate, row.held_out_rows, row.last_steps])
    .join(' ')

export type RunKey = Pick<
  QualityRow,
  | 'data'
  | 'precision'
  | 'seed'
  | 'model'
  | 'steps'
  | 'batch'
  | 'max_length'
  | 'learning_rate'
  | 'held_out_rows'
  | 'last_steps'
>

type LossName = 'last_loss' | 'held_out_loss'

export interface Comparison {
  data: string
  precision: Precision
  loss: LossName
  seeds: number
  mean: number
  /** Largest less smallest, between the seeds. */
  spread: number
  against: Precision | null
  /** Of the mean over the seeds that both have, in percent; null where there is none. */
  differencePercent: number | null
  /** The seed that differs most, in percent of its own pair. */
  mostPercent: number | null
}

const precisions: Precision[] = ['fp32', 'bf16', 'fp8']
const losses: LossName[] = ['last_loss', 'held_out_loss']

export function compare(rows: QualityRow[]): Comparison[] {
  const names = [...new Set(rows.map(({ data }) => data))]
  return names.flatMap((data) =>
    losses.flatMap((loss) =>
      precisions.flatMap((precision) => {
        const own = rows.filter((row) => row.data === data && row.precision === precision)
        if (own.length === 0) return []
        const values = own.map((row) => row[loss])
        return [
          {
            data,
            precision,
            loss,
            seeds: own.length,
            mean: mean(values),
            spread: Math.max(...values) - Math.min(...values),
            ...differenceOf(own, rows, loss),
          },
        ]
      }),
    ),
  )
}

/** A seed fixes order and adapter: each run has its own partner. */
function differenceOf(
  own: QualityRow[],
  rows: QualityRow[],
  loss: LossName,
): Pick<Comparison, 'against' | 'differencePercent' | 'mostPercent'> {
  const [first] = own
  const against = (first && comparedWith[first.precision]) ?? null
  const pairs = own.flatMap((row) => {
    const other = rows.find(
      ({ data, seed, precision }) =>
        data === row.data && seed === row.seed && precision === against,
    )
    return other === undefined ? [] : [[row[loss], other[loss]] as const]
  })
  if (pairs.length === 0) return { against, differencePercent: null, mostPercent: null }
  const percent = (value: number, other: number) => 100 * (value / other - 1)
  const each = pairs.map(([value, other]) => percent(value, other))
  return {
    against,
    differencePercent: percent(
      mean(pairs.map(([value]) => value)),
      mean(pairs.map(([, other]) => other)),
    ),
    mostPercent: each.reduce((most, one) => (Math.abs(one) > Math.abs(most) ? one : most), 0),
  }
}

export const isWithin = ({ differencePercent }: Comparison): boolean | null =>
  differencePercent === null ? null : Math.abs(differencePercent) <= limitPercent

const mean = (values: number[]) => values.reduce((sum, value) => sum + value, 0) / values.length
