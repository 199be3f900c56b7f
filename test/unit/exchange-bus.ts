/** A bus in memory that loses, doubles, reorders and damages messages by a seed. */
import { isFrame } from '../../proto/frame.js'
import type {
  BusMessage,
  GradientTransport,
  MessageListener,
} from '../../worker/nats-connection.js'

export interface BusFaults {
  drop: number
  double: number
  reorder: number
  damage: number
}

interface Subscriber {
  owner: string
  pattern: RegExp
  listener: MessageListener
}

export class ExchangeBus {
  readonly subjects: string[] = []
  /** Damaged frames that a subscriber heard. */
  numDamaged = 0
  numDropped = 0
  /** True: this message is lost. */
  loses: (subject: string, data: Uint8Array) => boolean = () => false
  readonly #subscribers = new Set<Subscriber>()
  #state: number

  constructor(
    private readonly faults: BusFaults = { drop: 0, double: 0, reorder: 0, damage: 0 },
    seed = 1,
  ) {
    this.#state = seed
  }

  /** A worker's connection: it does not hear itself. */
  connection(owner: string): GradientTransport {
    return {
      publish: (subject, data, reply) =>
        this.#publish(owner, subject, Uint8Array.from(data), reply),
      subscribe: (subject, listener) => {
        this.subjects.push(subject)
        const subscriber = { owner, pattern: patternOf(subject), listener }
        this.#subscribers.add(subscriber)
        return () => this.#subscribers.delete(subscriber)
      },
      flush: () => new Promise((resolve) => setImmediate(resolve)),
      onStatus: () => () => undefined,
    }
  }

  #publish(owner: string, subject: string, data: Uint8Array, reply: string | undefined): void {
    for (const subscriber of this.#subscribers) {
      if (subscriber.owner === owner || !subscriber.pattern.test(subject)) continue
      if (this.loses(subject, data) || this.#chance(this.faults.drop)) {
        this.numDropped++
        continue
      }
      const copies = this.#chance(this.faults.double) ? 2 : 1
      for (let copy = 0; copy < copies; copy++)
        this.#deliver(subscriber, { subject, data: Uint8Array.from(data), reply })
    }
  }

  #deliver(subscriber: Subscriber, message: BusMessage): void {
    const { data } = message
    const isDamaged = isFrame(data) && this.#chance(this.faults.damage)
    if (isDamaged) {
      const at = Math.floor(this.#random() * data.byteLength)
      data[at] = (data[at] ?? 0) ^ (1 << Math.floor(this.#random() * 8))
    }
    const arrive = () => {
      if (!this.#subscribers.has(subscriber)) return
      // Counted where it is heard: a second copy may still be under way when a step ends.
      if (isDamaged) this.numDamaged++
      subscriber.listener(message)
    }
    if (this.#chance(this.faults.reorder)) setTimeout(arrive, this.#random() * 5)
    else setImmediate(arrive)
  }

  #chance(probability: number): boolean {
    return this.#random() < probability
  }
  #random(): number {
    this.#state = (Math.imul(this.#state, 1664525) + 1013904223) >>> 0
    return this.#state / 2 ** 32
  }
}

const patternOf = (subject: string) =>
  new RegExp(`^${subject.replaceAll('.', '\\.').replaceAll('*', '[^.]+')}$`)
