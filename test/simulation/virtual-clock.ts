/** Simulated time: what is due next happens next; ties in the order they were asked for. */
interface Entry {
  atMs: number
  order: number
  run: () => void
}

export class VirtualClock {
  nowMs = 0
  #heap: Entry[] = []
  #order = 0

  after(delayMs: number, run: () => void): void {
    this.#push({ atMs: this.nowMs + Math.max(0, delayMs), order: this.#order++, run })
  }

  /** Runs until `isOver`, the given time, or nothing is left. */
  runUntil(endMs: number, isOver: () => boolean): void {
    while (!isOver()) {
      const entry = this.#heap[0]
      if (!entry || entry.atMs > endMs) return
      this.#pop()
      this.nowMs = entry.atMs
      entry.run()
    }
  }

  #push(entry: Entry): void {
    const heap = this.#heap
    let index = heap.push(entry) - 1
    while (index > 0) {
      const parent = (index - 1) >> 1
      if (isBefore(heap[parent] as Entry, entry)) break
      heap[index] = heap[parent] as Entry
      index = parent
    }
    heap[index] = entry
  }

  #pop(): void {
    const heap = this.#heap
    const last = heap.pop() as Entry
    if (heap.length === 0) return
    let index = 0
    for (;;) {
      let child = 2 * index + 1
      if (child >= heap.length) break
      const right = child + 1
      if (right < heap.length && isBefore(heap[right] as Entry, heap[child] as Entry)) child = right
      if (isBefore(last, heap[child] as Entry)) break
      heap[index] = heap[child] as Entry
      index = child
    }
    heap[index] = last
  }
}

const isBefore = (a: Entry, b: Entry): boolean =>
  a.atMs < b.atMs || (a.atMs === b.atMs && a.order < b.order)
