/** How a job's progress is shown: a bar that is redrawn for a person, plain lines for a file. */
import cliProgress from 'cli-progress'
import type { JobEvent } from '../client/client.js'
import type { StepCommitted__Output as Step } from '../proto/gen/tunemesh/v1/StepCommitted.js'
import { formatDuration, formatLoss, formatRate } from './format.js'
import type { Output } from './output.js'
import { isStepShown, renderEvent, renderStep } from './render-event.js'

export interface ProgressView {
  show(event: JobEvent): void
  close(): void
}

/** @param loggingSteps the job's, where it says */
export const progressView = (output: Output, loggingSteps: number | null): ProgressView =>
  output.isTerminal ? new BarView(output) : new LineView(output, loggingSteps)

class LineView implements ProgressView {
  constructor(
    private readonly output: Output,
    private readonly loggingSteps: number | null,
  ) {}

  show(event: JobEvent): void {
    if (event.step) {
      if (isStepShown(event.step, this.loggingSteps)) this.output.line(renderStep(event.step))
      return
    }
    for (const line of renderEvent(event, this.output.style)) this.output.line(line)
  }

  close(): void {}
}

/** One bar at the bottom; other events scroll by above it. */
class BarView implements ProgressView {
  #bar: cliProgress.SingleBar | null = null
  #last: Step | null = null

  constructor(private readonly output: Output) {}

  show(event: JobEvent): void {
    if (event.step) {
      this.#advance(event.step)
      return
    }
    const lines = renderEvent(event, this.output.style)
    if (lines.length === 0) return
    if (event.stepSkipped && this.#last) {
      const { step, etaMs } = event.stepSkipped
      this.#last = { ...this.#last, step, etaMs }
    }
    this.#pause()
    for (const line of lines) this.output.line(line)
    if (this.#last && this.#last.step < this.#last.numSteps) this.#advance(this.#last)
  }

  close(): void {
    this.#pause()
  }

  #advance(step: Step): void {
    this.#last = step
    if (this.#bar === null) {
      this.#bar = this.#newBar()
      this.#bar.start(step.numSteps, step.step, barFields(step))
    } else {
      this.#bar.update(step.step, barFields(step))
    }
  }

  #pause(): void {
    this.#bar?.stop()
    this.#bar = null
  }

  #newBar(): cliProgress.SingleBar {
    const { style } = this.output
    return new cliProgress.SingleBar(
      {
        format:
          `${style.accent('{bar}')} step {value}/{total}  loss ${style.bold('{loss}')}  ` +
          '{speed}  {left}',
        barCompleteChar: '━',
        barIncompleteChar: '┄',
        barsize: 24,
        hideCursor: true,
        clearOnComplete: true,
        stopOnComplete: false,
        gracefulExit: false,
        noTTYOutput: false,
        stream: this.output.stderr,
      },
      cliProgress.Presets.shades_classic,
    )
  }
}

const barFields = (step: Step) => ({
  loss: formatLoss(step.loss),
  speed: formatRate(step.tokensPerSecond),
  left: step.etaMs > 0 ? `${formatDuration(step.etaMs)} left` : '',
})
