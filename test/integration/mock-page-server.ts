/** The coordinator's page and live feed without a coordinator: tests decide what happens when. */
import { readFileSync } from 'node:fs'
import { createServer, type Server } from 'node:http'
import type { AddressInfo } from 'node:net'
import { extname, join, normalize } from 'node:path'
import { type WebSocket, WebSocketServer } from 'ws'
import type { FeedEvent, FeedJob, FeedWorker, Subscribe } from '../../dashboard/feed-messages.js'

const types: Record<string, string> = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript',
  '.css': 'text/css',
  '.svg': 'image/svg+xml',
}

const policy =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

export class MockPageServer {
  jobs: FeedJob[] = []
  workers: FeedWorker[] = []
  /** Every subscription that was asked for, to prove from where a page goes on. */
  readonly subscriptions: Subscribe[] = []
  readonly #events = new Map<string, FeedEvent[]>()
  readonly #readers = new Map<WebSocket, { jobId: string; sent: number } | null>()
  #server: Server | null = null
  #sockets: WebSocketServer | null = null
  #ping: NodeJS.Timeout | undefined

  constructor(private readonly pageDir: string) {}

  /** @returns the page's address */
  async start(port = 0): Promise<string> {
    const server = createServer((request, response) => {
      const path = normalize(new URL(request.url ?? '/', 'http://x').pathname)
      const name = path === '/' ? '/index.html' : path
      try {
        const body = readFileSync(join(this.pageDir, name))
        response.writeHead(200, {
          'content-type': types[extname(name)] ?? 'application/octet-stream',
          'content-security-policy': policy,
          'x-content-type-options': 'nosniff',
        })
        response.end(body)
      } catch {
        response.writeHead(404).end()
      }
    })
    this.#server = server
    this.#sockets = new WebSocketServer({ server, path: '/live', perMessageDeflate: false })
    this.#sockets.on('connection', (socket) => this.#welcome(socket))
    await new Promise<void>((resolve) => server.listen(port, '127.0.0.1', resolve))
    this.setBeat(true)
    return `http://127.0.0.1:${(server.address() as AddressInfo).port}/`
  }

  async stop(): Promise<void> {
    this.setBeat(false)
    for (const socket of this.#readers.keys()) socket.terminate()
    this.#readers.clear()
    this.#sockets?.close()
    this.#server?.closeAllConnections()
    await new Promise((resolve) => this.#server?.close(resolve))
  }

  /** Without its beat a connection is open and silent: the page must call that stale. */
  setBeat(isOn: boolean): void {
    clearInterval(this.#ping)
    if (isOn)
      this.#ping = setInterval(() => this.#sendAll({ type: 'ping', serverTimeMs: Date.now() }), 500)
  }

  push(
    jobId: string,
    event: Omit<FeedEvent, 'sequence' | 'jobId' | 'timeMs'>,
    timeMs = Date.now(),
  ) {
    const events = this.#events.get(jobId) ?? []
    events.push({ ...event, sequence: events.length + 1, jobId, timeMs })
    this.#events.set(jobId, events)
    for (const socket of this.#readers.keys()) this.#sendNew(socket)
  }

  #welcome(socket: WebSocket): void {
    this.#readers.set(socket, null)
    socket.on('close', () => this.#readers.delete(socket))
    socket.on('message', (data) => {
      const asked = JSON.parse(String(data)) as Subscribe
      this.subscriptions.push(asked)
      this.#readers.set(socket, { jobId: asked.jobId, sent: asked.afterSequence })
      this.#sendNew(socket)
    })
    send(socket, { type: 'hello', jobs: this.jobs, serverTimeMs: Date.now() })
    send(socket, { type: 'fleet', workers: this.workers })
  }

  #sendNew(socket: WebSocket): void {
    const reader = this.#readers.get(socket)
    if (!reader) return
    const events = this.#events.get(reader.jobId)?.slice(reader.sent) ?? []
    if (events.length === 0) return
    reader.sent += events.length
    send(socket, { type: 'events', jobId: reader.jobId, events })
  }

  #sendAll(message: object): void {
    for (const socket of this.#readers.keys()) send(socket, message)
  }
}

const send = (socket: WebSocket, message: object) => socket.send(JSON.stringify(message))
