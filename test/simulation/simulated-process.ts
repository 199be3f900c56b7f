/** A process that may die or sleep: what happens to a dead one is lost, to a paused one late. */
import type { VirtualClock } from './virtual-clock.js'

export class SimulatedProcess {
  isAlive = true
  #backlog: (() => void)[] | null = null

  constructor(private readonly clock: VirtualClock) {}

  guard(run: () => void): void {
    if (!this.isAlive) return
    if (this.#backlog) this.#backlog.push(run)
    else run()
  }

  after(delayMs: number, run: () => void): void {
    this.clock.after(delayMs, () => this.guard(run))
  }

  every(intervalMs: number, run: () => void): void {
    this.after(intervalMs, () => {
      run()
      this.every(intervalMs, run)
    })
  }

  pause(forMs: number): void {
    if (this.#backlog) return
    this.#backlog = []
    this.clock.after(forMs, () => {
      const backlog = this.#backlog ?? []
      this.#backlog = null
      for (const run of backlog) this.guard(run)
    })
  }

  crash(): void {
    this.isAlive = false
  }
}
