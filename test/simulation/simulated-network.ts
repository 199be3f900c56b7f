/** JetStream's commit subject and core NATS, with the faults that real ones have. */
import type { CommitLogRecord, LoggedRecord } from '../../proto/commit-record.js'
import type { Faults } from './options.js'
import type { Random } from './random.js'
import type { VirtualClock } from './virtual-clock.js'

export type AppendOutcome = { kind: 'stands'; sequence: number } | { kind: 'refused' | 'unknown' }

/**
 * Compare-and-set appends; an answer may be lost, and an append may land after its answer was given
 * up.
 */
export class SimulatedJetStream {
  readonly log: LoggedRecord[] = []
  isUp = true
  /** Mutation `skipFencing`: appends whatever the expected sequence. */
  ignoresExpectedSequence = false
  onAppended: (logged: LoggedRecord) => void = () => {}
  #lastSequence = 0

  constructor(
    private readonly clock: VirtualClock,
    private readonly random: Random,
    private readonly faults: Faults,
  ) {}

  append(
    record: CommitLogRecord,
    expectedLastSequence: number,
    answer: (outcome: AppendOutcome) => void,
  ): void {
    const { random, clock } = this
    const copy = structuredClone(record)
    if (random.chance(this.faults.unknownAppend)) {
      clock.after(random.between(50, 300), () => answer({ kind: 'unknown' }))
      if (random.chance(0.3)) return
      const isLate = random.chance(0.4)
      clock.after(random.between(1, isLate ? 1_500 : 20), () => {
        if (this.isUp) this.#tryAppend(copy, expectedLastSequence)
      })
      return
    }
    clock.after(random.between(0.5, 3), () => {
      if (!this.isUp) {
        clock.after(100, () => answer({ kind: 'unknown' }))
        return
      }
      const sequence = this.#tryAppend(copy, expectedLastSequence)
      clock.after(random.between(0.5, 3), () =>
        answer(sequence === null ? { kind: 'refused' } : { kind: 'stands', sequence }),
      )
    })
  }

  read(answer: (log: readonly LoggedRecord[] | null) => void): void {
    this.clock.after(this.random.between(0.5, 4), () => answer(this.isUp ? [...this.log] : null))
  }

  #tryAppend(record: CommitLogRecord, expectedLastSequence: number): number | null {
    if (expectedLastSequence !== this.#lastSequence && !this.ignoresExpectedSequence) return null
    // Other jobs' records lie between.
    this.#lastSequence += this.random.integer(1, 3)
    const logged = { sequence: this.#lastSequence, record }
    this.log.push(logged)
    this.onAppended(logged)
    return this.#lastSequence
  }
}

/** At most once, sometimes twice, in any order. */
export class SimulatedCoreNats<Message> {
  isUp = true

  constructor(
    private readonly clock: VirtualClock,
    private readonly random: Random,
    private readonly faults: Faults,
  ) {}

  deliver(message: Message, receive: (message: Message) => void): void {
    const { random, faults } = this
    if (!this.isUp || random.chance(faults.loss)) return
    const copies = random.chance(faults.duplication) ? 2 : 1
    for (let copy = 0; copy < copies; copy++) {
      const slow = random.chance(faults.reordering) ? 60 : 3
      this.clock.after(random.between(0.2, slow), () => {
        if (this.isUp) receive(message)
      })
    }
  }
}

/** One gRPC stream: ordered and reliable until it breaks; what is on its way then is lost. */
export class SimulatedStream<Up, Down> {
  isBroken = false
  #upAtMs = 0
  #downAtMs = 0

  constructor(
    private readonly clock: VirtualClock,
    private readonly random: Random,
    private readonly ends: {
      up: (message: Up) => void
      down: (message: Down) => void
      upBroken: () => void
      downBroken: () => void
    },
  ) {}

  sendUp(message: Up): void {
    if (this.isBroken) return
    this.#upAtMs = Math.max(this.#upAtMs, this.clock.nowMs + this.random.between(0.2, 2))
    this.clock.after(this.#upAtMs - this.clock.nowMs, () => {
      if (!this.isBroken) this.ends.up(message)
    })
  }

  sendDown(message: Down): void {
    if (this.isBroken) return
    this.#downAtMs = Math.max(this.#downAtMs, this.clock.nowMs + this.random.between(0.2, 2))
    this.clock.after(this.#downAtMs - this.clock.nowMs, () => {
      if (!this.isBroken) this.ends.down(message)
    })
  }

  /** Each side notices in its own time. */
  break(): void {
    if (this.isBroken) return
    this.isBroken = true
    this.clock.after(this.random.between(0.5, 30), this.ends.upBroken)
    this.clock.after(this.random.between(0.5, 30), this.ends.downBroken)
  }
}
