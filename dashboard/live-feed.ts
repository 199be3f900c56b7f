/**
 * The page's one connection: keeps it open, asks for the chosen job from the last sequence seen.
 *
 * All state lies in views keyed by sequence, so a connection that breaks costs nothing but time.
 */
import type { FeedJob, FeedWorker, FromCoordinator, Subscribe } from './feed-messages.js'
import { reconnectDelayMs, staleAfterMs } from './freshness.js'
import { JobView } from './job-view.js'

/** Silent for this long, a connection is given up and opened again. */
const deadAfterMs = 5 * staleAfterMs

export class LiveFeed {
  jobs: FeedJob[] = []
  /** All of the mesh, whatever they do; null until the coordinator has told. */
  workers: FeedWorker[] | null = null
  chosen: JobView | null = null
  isOpen = false
  lastHeardMs: number | null = null
  /** Server clock less ours. */
  clockOffsetMs = 0
  #socket: WebSocket | null = null
  #attempt = 0
  #onChange: () => void = () => {}
  /** A job named in the address stays chosen even before the server lists it. */
  readonly #wanted: string | null

  constructor(
    private readonly url: string,
    wanted: string | null,
  ) {
    this.#wanted = wanted
  }

  start(onChange: () => void): () => void {
    this.#onChange = onChange
    this.#connect()
    const watchdog = setInterval(() => this.#giveUpIfDead(), staleAfterMs)
    return () => {
      clearInterval(watchdog)
      this.#onChange = () => {}
      this.#socket?.close()
    }
  }

  choose(jobId: string): void {
    if (this.chosen?.jobId === jobId) return
    this.chosen = new JobView(jobId)
    this.#subscribe()
    this.#onChange()
  }

  nowMs(): number {
    return Date.now() + this.clockOffsetMs
  }

  #connect(): void {
    const socket = new WebSocket(this.url)
    this.#socket = socket
    socket.addEventListener('open', () => {
      this.isOpen = true
      this.#attempt = 0
      this.lastHeardMs = Date.now()
      this.#subscribe()
      this.#onChange()
    })
    socket.addEventListener('message', (message) => {
      this.lastHeardMs = Date.now()
      this.#receive(JSON.parse(String(message.data)) as FromCoordinator)
      this.#onChange()
    })
    socket.addEventListener('close', () => {
      if (this.#socket !== socket) return
      this.isOpen = false
      this.#attempt++
      setTimeout(() => this.#connect(), reconnectDelayMs(this.#attempt, Math.random()))
      this.#onChange()
    })
  }

  #giveUpIfDead(): void {
    const silentMs = Date.now() - (this.lastHeardMs ?? Date.now())
    if (this.isOpen && silentMs > deadAfterMs) this.#socket?.close()
  }

  #receive(message: FromCoordinator): void {
    if (message.type === 'hello') {
      this.jobs = message.jobs
      this.clockOffsetMs = message.serverTimeMs - Date.now()
      this.#chooseFirst()
    } else if (message.type === 'events') this.#applyEvents(message)
    else if (message.type === 'fleet') this.workers = message.workers
    else if (message.type === 'ping') this.clockOffsetMs = message.serverTimeMs - Date.now()
  }

  #applyEvents(message: FromCoordinator & { type: 'events' }): void {
    const view = this.chosen
    if (view === null || message.jobId !== view.jobId) return
    // A hole: ask again from what we have.
    if (!view.apply(message.events)) this.#subscribe()
    const listed = this.jobs.find((job) => job.jobId === view.jobId)
    if (listed) Object.assign(listed, { state: view.state, step: view.step })
  }

  /** The job named in the address, else the newest one that is under way, else the newest. */
  #chooseFirst(): void {
    if (this.chosen !== null) return
    const newestFirst = [...this.jobs].sort((a, b) => (b.createdAtMs ?? 0) - (a.createdAtMs ?? 0))
    const first =
      newestFirst.find((job) => job.jobId === this.#wanted) ??
      newestFirst.find((job) => job.state === 'RUNNING') ??
      newestFirst[0]
    if (first) this.choose(first.jobId)
  }

  #subscribe(): void {
    const view = this.chosen
    if (view === null || this.#socket?.readyState !== WebSocket.OPEN) return
    const message: Subscribe = {
      type: 'subscribe',
      jobId: view.jobId,
      afterSequence: view.lastSequence,
    }
    this.#socket.send(JSON.stringify(message))
  }
}
