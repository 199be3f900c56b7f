/**
 * Where words go: results to stdout, what only accompanies them to stderr. With --json stdout
 * carries JSON lines and nothing else.
 */
import { coloured, type Style, uncoloured } from './style.js'

export interface OutputOptions {
  json: boolean
  /** NO_COLOR or --no-color. */
  noColor: boolean
}

export class Output {
  readonly isJson: boolean
  readonly style: Style
  /** A person looks at stderr: progress may be redrawn in place. */
  readonly isTerminal: boolean

  constructor(
    private readonly stdout: NodeJS.WriteStream,
    readonly stderr: NodeJS.WriteStream,
    options: OutputOptions,
  ) {
    this.isJson = options.json
    this.isTerminal = stderr.isTTY === true && !options.json
    this.style = options.noColor || options.json || !stdout.isTTY ? uncoloured : coloured
  }

  /** A line for people; silent with --json. */
  line(text = ''): void {
    if (!this.isJson) this.stdout.write(`${text}\n`)
  }

  /**
   * Lines for people, in the place of the `numBefore` that were drawn last where a person looks at
   * stdout. Answers how many there are now.
   */
  redraw(lines: string[], numBefore: number): number {
    if (this.isJson) return 0
    const clears = this.stdout.isTTY && numBefore > 0
    if (clears) this.stdout.write(`\x1b[${numBefore}A\x1b[J`)
    const width = this.stdout.isTTY ? this.stdout.columns : Number.POSITIVE_INFINITY
    // A line that wraps would count twice.
    for (const line of lines) this.stdout.write(`${[...line].slice(0, width).join('')}\n`)
    return lines.length
  }

  /** Text without a line's end, for answers that grow. */
  text(text: string): void {
    if (!this.isJson) this.stdout.write(text)
  }

  /** A remark beside the result: on stderr, where no program reads it as data. */
  note(text: string): void {
    this.stderr.write(`${text}\n`)
  }

  /** A record for programs; silent without --json. */
  record(type: string, fields: object): void {
    if (this.isJson) this.stdout.write(`${JSON.stringify({ type, ...fields })}\n`)
  }

  error(text: string): void {
    this.stderr.write(`${text}\n`)
  }
}
