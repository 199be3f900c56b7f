/** What is told of a fleet's workers: to `tunemesh fleet`, to the page, in job events. */
import type { WorkerInfo } from '../proto/gen/tunemesh/v1/WorkerInfo.js'
import type { FleetWorker } from './fleet.js'

/** Workers that have left are told for so long, and so many of them. */
const goneLifeMs = 10 * 60_000
const maxGone = 64

/** @param nowMs monotonic, of the fleet's clock */
export const workerMessage = (worker: FleetWorker, nowMs: number): WorkerInfo => {
  const { hello, heartbeat } = worker
  return {
    workerId: worker.id,
    host: hello.host,
    hostId: worker.hostId,
    device: hello.device,
    deviceClass: hello.deviceClass,
    version: hello.version,
    system: hello.system,
    libraries: hello.libraries,
    precisions: hello.precisions,
    state: worker.state,
    tokensPerSecond: worker.tokensPerSecond,
    jobId: worker.jobId,
    share: worker.share,
    processId: hello.processId,
    memoryBytes: heartbeat?.residentBytes ?? 0,
    deviceMemoryBytes: hello.memoryBytes,
    plannedBytes: worker.jobId === '' ? 0 : worker.plannedBytes,
    numThreads: hello.numThreads,
    doing: heartbeat?.doing ?? '',
    step: worker.jobId === '' ? 0 : (heartbeat?.step ?? 0),
    silentMs: Math.max(0, Math.round(nowMs - worker.lastSeenMs)),
    attachedForMs: Math.max(0, Math.round(nowMs - worker.attachedAtMs)),
  }
}

/** Workers that left a short while ago, the newest first. */
export class GoneWorkers {
  #gone: { worker: FleetWorker; reason: string }[] = []

  add(worker: FleetWorker, reason: string): void {
    this.forget(worker.id)
    this.#gone = [{ worker, reason }, ...this.#gone].slice(0, maxGone)
  }

  /** It is back. */
  forget(workerId: string): void {
    this.#gone = this.#gone.filter(({ worker }) => worker.id !== workerId)
  }

  list(nowMs: number): WorkerInfo[] {
    this.#gone = this.#gone.filter(({ worker }) => nowMs - worker.lastSeenMs < goneLifeMs)
    return this.#gone.map(({ worker, reason }) => ({
      ...workerMessage(worker, nowMs),
      state: 'gone',
      goneReason: reason,
      share: 0,
      doing: '',
    }))
  }
}
