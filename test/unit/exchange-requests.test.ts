import assert from 'node:assert/strict'
import { test } from 'node:test'
import { encodeCredit, isFrame, readFrameHeader } from '../../proto/frame.js'
import { contributionSubject, creditSubject, sentBy } from '../../proto/subjects.js'
import { DataPlane, type DataPlaneEffect } from '../../worker/data-plane.js'
import { ExchangeBuffers } from '../../worker/exchange-buffers.js'
import type { WorkerEvent } from '../../worker/run-events.js'
import { ExchangeBus } from './exchange-bus.js'
import { createExchange, fastClock, gradientLike } from './exchange-fixture.js'

const layout = { numBlocks: 60, sliceBlocks: 30, chunkBlocks: 8 }
const layoutChunks = Math.ceil(layout.sliceBlocks / layout.chunkBlocks)
type EventOf<Kind extends WorkerEvent['kind']> = Extract<WorkerEvent, { kind: Kind }>

/** One data plane whose events a test waits for, in the place of a run machine. */
class Station {
  readonly trial = createExchange({ ...layout, significantBits: 24, numContributionSlots: 2 })
  readonly buffers = new ExchangeBuffers(this.trial)
  readonly events: WorkerEvent[] = []
  readonly plane: DataPlane
  #wake: () => void = () => undefined

  constructor(bus: ExchangeBus, workerId: string) {
    this.plane = new DataPlane({
      jobId: 'job-1',
      workerId: () => workerId,
      exchange: this.buffers,
      connect: async () => bus.connection(workerId),
      clock: fastClock(10),
      onEvent: (event) => {
        this.events.push(event)
        this.#wake()
      },
    })
  }

  /** Fills a contribution slot; answers the digest of slice 0. */
  async fill(slot: number, seed: number): Promise<string> {
    await this.buffers.clearSlot(slot)
    await this.trial.roundAndAdd(slot, gradientLike(layout.numBlocks * 256, seed))
    return (await this.buffers.contributionDigests(slot))[0] ?? ''
  }

  do(...effects: DataPlaneEffect[]): void {
    for (const effect of effects) this.plane.carryOut(effect)
  }

  /** The next event of this kind; it is taken from the list. */
  async next<Kind extends WorkerEvent['kind']>(kind: Kind): Promise<EventOf<Kind>> {
    for (;;) {
      const at = this.events.findIndex((event) => event.kind === kind)
      if (at >= 0) return this.events.splice(at, 1)[0] as EventOf<Kind>
      await new Promise<void>((resolve) => {
        this.#wake = resolve
      })
    }
  }
}

const ids = ['w-0', 'w-1', 'w-2']
function stations(bus: ExchangeBus, fleetEpoch = 1): [Station, Station, Station] {
  const [a, b, c] = ids.map((id) => new Station(bus, id)) as [Station, Station, Station]
  for (const station of [a, b, c]) {
    station.do(
      { kind: 'openEpoch', fleetEpoch, workerIds: ids },
      { kind: 'acceptSums', steps: [1] },
    )
  }
  return [a, b, c]
}
const close = (...all: Station[]) => Promise.all(all.map(({ plane }) => plane.close()))

/** As owner of slice 0: the sum of one own contribution, published. */
async function publishOwn(
  owner: Station,
  seed: number,
  slice: { fleetEpoch: number; step: number; slice: number; sliceAttempt: number },
) {
  await owner.fill(0, seed)
  owner.do(
    { kind: 'openSlice', ...slice },
    { kind: 'countContribution', slot: 0, lease: 0, leaseAttempt: 0, ...slice },
    { kind: 'finishSlice', ...slice },
    { kind: 'publishSum', ...slice },
  )
  return (await owner.next('sliceFinished')).publishedDigest
}

const slice0 = { fleetEpoch: 1, step: 1, slice: 0, sliceAttempt: 0 }

test('exchange: chunks of two attempts of a lease are never assembled together', async () => {
  const bus = new ExchangeBus()
  const [owner, first, second] = stations(bus)
  // The first attempt's worker never gets its second chunk through, as if it died in the middle.
  bus.loses = (_, data) => {
    if (!isFrame(data)) return false
    const { leaseAttempt, chunk } = readFrameHeader(data)
    return leaseAttempt === 0 && chunk === 1
  }
  owner.do({ kind: 'openSlice', ...slice0 })
  const key = { ...slice0, lease: 4, slot: 0, ownerWorkerId: 'w-0' }
  first.do({ kind: 'sendContribution', ...key, leaseAttempt: 0, digest: await first.fill(0, 1) })
  const digest = await second.fill(0, 2)
  second.do({ kind: 'sendContribution', ...key, leaseAttempt: 1, digest })
  const arrived = await owner.next('contributionArrived')
  assert.equal(arrived.leaseAttempt, 1)
  assert.equal(arrived.digest, digest)
  assert.equal((await second.next('contributionDelivered')).leaseAttempt, 1)
  const { kind: _, digest: __, ...counted } = arrived
  owner.do(
    { kind: 'countContribution', slot: null, ...counted },
    { kind: 'finishSlice', ...slice0 },
  )
  assert.equal((await owner.next('sliceFinished')).sumDigest, digest)
  // The lease has counted: the other attempt is told to stop and is not taken.
  await first.next('contributionDelivered')
  assert.deepEqual(owner.events, [])
  await close(owner, first, second)
})

test('exchange: a worker that is not its owner serves a sum, also in a later epoch', async () => {
  const bus = new ExchangeBus()
  const [owner, holder, late] = stations(bus)
  late.do({ kind: 'acceptSums', steps: [] })
  const digest = await publishOwn(owner, 3, slice0)
  assert.deepEqual(await holder.next('sumArrived'), {
    kind: 'sumArrived',
    step: 1,
    slice: 0,
    digest,
  })
  for (const station of [holder, late]) {
    station.do({ kind: 'openEpoch', fleetEpoch: 2, workerIds: ids.slice(1) })
  }
  late.do(
    { kind: 'acceptSums', steps: [1] },
    { kind: 'requestSum', step: 1, slice: 0, fromWorkerId: 'w-1', digest },
  )
  const asked = await holder.next('sumRequested')
  assert.deepEqual(asked, { kind: 'sumRequested', step: 1, slice: 0, digest, byWorkerId: 'w-2' })
  holder.do({ kind: 'sendSum', step: 1, slice: 0, toWorkerId: 'w-2' })
  assert.equal((await late.next('sumArrived')).digest, digest)
  const half = layout.sliceBlocks * 256
  assert.deepEqual(late.trial.published(1).slice(0, half), owner.trial.published(1).slice(0, half))
  // What nobody holds is said to be so.
  late.do({ kind: 'requestSum', step: 1, slice: 1, fromWorkerId: 'w-1', digest })
  await holder.next('sumRequested')
  holder.do({ kind: 'sendSum', step: 1, slice: 1, toWorkerId: 'w-2' })
  const none = await late.next('sumUnavailable')
  assert.deepEqual(none, { kind: 'sumUnavailable', step: 1, slice: 1, fromWorkerId: 'w-1' })
  await close(owner, holder, late)
})

test("exchange: a credit in another worker's name is dropped and counted", async () => {
  const bus = new ExchangeBus()
  const [owner, receiver, forger] = stations(bus)
  receiver.do({ kind: 'acceptSums', steps: [] })
  const digest = await publishOwn(owner, 3, slice0)
  await forger.next('sumArrived')
  receiver.do({ kind: 'acceptSums', steps: [1] })
  const forged = encodeCredit({ kind: 'wantSum', from: 'w-1', step: 1, slice: 0, digest })
  const credits = creditSubject('job-1', 1, 'w-0')
  bus.connection('w-2').publish(sentBy(credits, 'w-2'), forged)
  // The same from the worker that it names is heard.
  receiver.do({ kind: 'requestSum', step: 1, slice: 0, fromWorkerId: 'w-0', digest })
  assert.equal((await owner.next('sumRequested')).byWorkerId, 'w-1')
  assert.equal(owner.plane.counts.creditsRefused, 1)
  assert.deepEqual(owner.events, [])
  await close(owner, receiver, forger)
})

test('exchange: a later slice attempt replaces a sum, an earlier one does not', async () => {
  const bus = new ExchangeBus()
  const [former, owner, receiver] = stations(bus)
  const stale: { subject: string; data: Uint8Array }[] = []
  bus.loses = (subject, data) => {
    if (isFrame(data)) stale.push({ subject, data })
    return false
  }
  const staleDigest = await publishOwn(former, 3, slice0)
  assert.equal((await receiver.next('sumArrived')).digest, staleDigest)
  bus.loses = () => false
  const digest = await publishOwn(owner, 5, { ...slice0, sliceAttempt: 1 })
  assert.notEqual(digest, staleDigest)
  await receiver.next('sumOverwritten')
  assert.equal((await receiver.next('sumArrived')).digest, digest)
  await former.next('sumArrived')
  // The former owner's frames come once more, late.
  const ignored = receiver.plane.counts.framesIgnored
  for (const { subject, data } of stale) bus.connection('w-0').publish(subject, data)
  await new Promise((resolve) => setImmediate(() => setImmediate(resolve)))
  assert.ok(receiver.plane.counts.framesIgnored >= ignored + layoutChunks)
  assert.equal(await receiver.buffers.publishedDigest(1, 0), digest)
  assert.deepEqual(receiver.events, [])
  await close(former, owner, receiver)
})

test('exchange: a zombie of an older fleet epoch reaches nobody: its headers tell', async () => {
  const bus = new ExchangeBus()
  const [owner, zombie, third] = stations(bus)
  owner.do({ kind: 'openEpoch', fleetEpoch: 2, workerIds: ids })
  const current = { ...slice0, fleetEpoch: 2 }
  owner.do({ kind: 'openSlice', ...current })
  const digest = await zombie.fill(0, 7)
  const old = { ...slice0, lease: 1, leaseAttempt: 0 }
  zombie.do({ kind: 'sendContribution', ...old, slot: 0, ownerWorkerId: 'w-0', digest })
  // Even on the new subject: the header names the old epoch.
  const { fleetEpoch, ...header } = { ...old, jobHash: 0n }
  const [bytes = 0] = await zombie.buffers.packContribution(0, {
    header: { ...header, fleetEpoch },
    chunks: [0],
    frames: [3],
  })
  const subject = contributionSubject({ job: 'job-1', ownerWorkerId: 'w-0', ...current })
  bus.connection('w-1').publish(sentBy(subject, 'w-1'), zombie.buffers.frame(3, bytes))
  // A contribution of this epoch passes meanwhile.
  third.do({ kind: 'openEpoch', fleetEpoch: 2, workerIds: ids })
  const good = await third.fill(0, 8)
  third.do({
    kind: 'sendContribution',
    ...old,
    ...current,
    slot: 0,
    ownerWorkerId: 'w-0',
    digest: good,
  })
  assert.equal((await owner.next('contributionArrived')).digest, good)
  assert.equal(owner.plane.counts.framesIgnored, 1)
  assert.deepEqual(owner.events, [])
  await close(owner, zombie, third)
})
