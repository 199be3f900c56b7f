/** Ctrl-C, SIGTERM and a closed terminal: counted here, acted on by the verb that is running. */
import type { EventEmitter } from 'node:events'

/** `count` is 1 at the first interrupt of the process, 2 at the second. */
export type OnInterrupt = (count: number) => void

const signals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

export class Interrupts {
  #count = 0
  readonly #handlers: OnInterrupt[] = []

  constructor(source: EventEmitter, fallback: OnInterrupt) {
    this.#handlers.push(fallback)
    for (const signal of signals) source.on(signal, () => this.#interrupt())
  }

  /** The newest handler alone hears interrupts, until the returned function takes it away. */
  handle(handler: OnInterrupt): () => void {
    this.#handlers.push(handler)
    return () => {
      const at = this.#handlers.lastIndexOf(handler)
      if (at > 0) this.#handlers.splice(at, 1)
    }
  }

  #interrupt(): void {
    this.#count++
    this.#handlers.at(-1)?.(this.#count)
  }
}
