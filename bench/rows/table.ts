/** Rows of a benchmark as a table. */
export interface Column<Row> {
  title: string
  /** Negative: aligned to the left. */
  width: number
  text(row: Row): string
}

export function tableLine<Row>(
  columns: Column<Row>[],
  textOf: (column: Column<Row>) => string,
): string {
  return columns
    .map((column) => {
      const text = textOf(column)
      return column.width < 0 ? text.padEnd(-column.width) : text.padStart(column.width)
    })
    .join('  ')
}
