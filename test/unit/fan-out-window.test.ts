import assert from 'node:assert/strict'
import { test } from 'node:test'
import { DataPlaneLink, type EpochScope } from '../../worker/data-plane-link.js'
import { DataPlanePublisher } from '../../worker/data-plane-publisher.js'

const windowBytes = 16 << 20
const mib = 1 << 20
const numChunks = 12
const allChunks = Array.from({ length: numChunks }, (_, chunk) => chunk)

/** An owner whose sums go to nobody: what it publishes before anyone acknowledges is counted. */
class Owner {
  readonly publisher: DataPlanePublisher
  /** Frames of each slice, in the order in which they went out. */
  readonly sent: { slice: number; chunk: number }[] = []
  nowMs = 0
  #packed: { slice: number; chunks: readonly number[] }[] = []

  constructor(
    readonly workerIds: string[],
    readonly frameBytes: number,
  ) {
    const exchange = {
      layout: { numBlocks: 1 << 20, sliceBlocks: 12 * 1024, chunkBlocks: frameBytes / 1024 },
      numFrameSlots: 64,
      numChunks: () => numChunks,
      frame: (_slot: number, bytes: number) => new Uint8Array(bytes),
      packPublished: async ({
        header,
        chunks,
      }: {
        header: { slice: number }
        chunks: readonly number[]
      }) => {
        await nextTurn()
        this.#packed.push({ slice: header.slice, chunks })
        return chunks.map(() => frameBytes)
      },
    }
    const scope = {
      jobId: 'job-1',
      jobHash: 1n,
      fleetEpoch: 1,
      workerId: workerIds[0],
      workerIds,
      exchange,
      counts: { framesSent: 0, bytesSent: 0 },
      nowMs: () => this.nowMs,
      emit: () => {},
      fail: (_operation: string, _step: number, error: unknown) => assert.fail(String(error)),
    } as unknown as EpochScope
    const transport = {
      publish: (subject: string) => {
        const slice = Number(subject.split('.')[5])
        const batch = this.#packed.find((packed) => packed.slice === slice)
        const [chunk = -1, ...rest] = batch?.chunks ?? []
        if (batch) batch.chunks = rest
        this.#packed = this.#packed.filter(({ chunks }) => chunks.length > 0)
        this.sent.push({ slice, chunk })
      },
      subscribe: () => () => {},
      flush: async () => {},
      onStatus: () => () => {},
    }
    const link = new DataPlaneLink(transport, scope, () => {})
    this.publisher = new DataPlanePublisher({ ...scope, link })
  }

  publish(numSlices: number): Promise<void> {
    for (let slice = 0; slice < numSlices; slice++) {
      this.publisher.publish({ step: 1, slice, sliceAttempt: 0 })
    }
    return quiet()
  }

  /** As the timer does it, so much later. */
  tickAfter(ms: number): Promise<void> {
    this.nowMs += ms
    this.publisher.tick()
    return quiet()
  }

  /** Acknowledges what was sent, and what is sent upon that, until nothing more comes. */
  async deliver(...workerIds: string[]): Promise<void> {
    for (let next = 0; next < this.sent.length; next++) {
      const frame = this.sent[next]
      assert.ok(frame)
      for (const id of workerIds) await this.acknowledge(id, frame)
    }
  }

  chunksSent(): number[] {
    return this.sent.map(({ chunk }) => chunk).sort((a, b) => a - b)
  }

  acknowledge(from: string, { slice, chunk }: { slice: number; chunk: number }): Promise<void> {
    const key = { step: 1, slice, sliceAttempt: 0 }
    this.publisher.receive({ kind: 'stored', ...key, chunks: [chunk], from })
    return quiet()
  }
}

const nextTurn = () => new Promise<void>((resolve) => setImmediate(resolve))
/** All that can go out without another message has gone. */
async function quiet(): Promise<void> {
  for (let turn = 0; turn < 100; turn++) await nextTurn()
}

for (const numWorkers of [2, 4]) {
  for (const numSlices of [2, 8]) {
    test(`${numWorkers} workers, ${numSlices} slices: a window is filled, no more`, async () => {
      const ids = Array.from({ length: numWorkers }, (_, index) => `w-${index}`)
      const owner = new Owner(ids, mib)
      const atMost = windowBytes / numWorkers / mib
      await owner.publish(numSlices)
      assert.equal(owner.sent.length, atMost)
      // What all but one have acknowledged is still pending for that one.
      const [first] = owner.sent
      assert.ok(first)
      for (const id of ids.slice(1, -1)) await owner.acknowledge(id, first)
      assert.equal(owner.sent.length, atMost)
      await owner.acknowledge(ids.at(-1) ?? '', first)
      assert.equal(owner.sent.length, atMost + 1)
    })
  }
}

test('frames that do not divide the window stay below it', async () => {
  const owner = new Owner(['w-0', 'w-1'], 3 * mib)
  await owner.publish(4)
  assert.equal(owner.sent.length, 2)
})

test('a frame larger than the window goes alone', async () => {
  const owner = new Owner(['w-0', 'w-1'], 9 * mib)
  await owner.publish(4)
  assert.equal(owner.sent.length, 1)
  const [first] = owner.sent
  assert.ok(first)
  await owner.acknowledge('w-1', first)
  assert.equal(owner.sent.length, 2)
})

test('a window that is lost altogether goes out again: lost bytes hold no room', async () => {
  const owner = new Owner(['w-0', 'w-1'], mib)
  await owner.publish(1)
  assert.equal(owner.sent.splice(0).length, 8)
  await owner.tickAfter(999)
  assert.deepEqual(owner.sent, [])
  await owner.tickAfter(1)
  assert.equal(owner.sent.length, 8)
  await owner.deliver('w-1')
  assert.deepEqual(owner.chunksSent(), allChunks)
})

test('one of two receivers loses its window: it gets all, the other waits no longer', async () => {
  const owner = new Owner(['w-0', 'w-1', 'w-2'], mib)
  await owner.publish(1)
  assert.equal(owner.sent.length, 5)
  await owner.deliver('w-1')
  assert.equal(owner.sent.splice(0).length, 5)
  await owner.tickAfter(1_000)
  await owner.deliver('w-1', 'w-2')
  assert.deepEqual(owner.chunksSent(), allChunks)
})

test('a receiver that stays silent is sent to four times, then nobody waits for it', async () => {
  const owner = new Owner(['w-0', 'w-1', 'w-2'], mib)
  await owner.publish(1)
  for (const ms of [1_000, 2_000, 4_000, 8_000]) {
    await owner.deliver('w-1')
    assert.equal(owner.sent.splice(0).length, 5)
    await owner.tickAfter(ms)
  }
  assert.deepEqual(owner.sent, [])
  owner.publisher.publish({ step: 1, slice: 1, sliceAttempt: 0 })
  await quiet()
  await owner.deliver('w-1')
  assert.deepEqual(owner.chunksSent(), allChunks)
})
