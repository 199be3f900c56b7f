/**
 * The dashboard's server: built pages and one websocket, for a browser on this machine that holds
 * our cookie.
 */
import { createReadStream } from 'node:fs'
import { stat } from 'node:fs/promises'
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { extname, join, normalize, sep } from 'node:path'
import type { Duplex } from 'node:stream'
import type { Logger } from 'pino'
import { WebSocketServer } from 'ws'
import type { BrowserAccess } from './access.js'
import { portTaken } from './grpc-server.js'
import { type FeedSources, serveLiveFeed } from './live-feed.js'

const contentTypes: Readonly<Record<string, string>> = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.svg': 'image/svg+xml',
  '.json': 'application/json',
  '.woff2': 'font/woff2',
  '.png': 'image/png',
}

const maxClients = 256
/** A page only ever says which job it shows. */
const maxMessageBytes = 4_096

export interface HttpServerOptions {
  /** 0: any free one. */
  port: number
  pagesDir: string
  access: BrowserAccess
  feed: FeedSources
  log: Logger
}

export class HttpServer {
  readonly #sockets = new WebSocketServer({
    noServer: true,
    perMessageDeflate: false,
    maxPayload: maxMessageBytes,
  })

  private constructor(
    private readonly options: HttpServerOptions,
    private readonly server: Server,
    readonly port: number,
  ) {}

  /** @throws TunemeshError PORT_TAKEN */
  static async listen(options: HttpServerOptions): Promise<HttpServer> {
    const server = createServer({ maxHeaderSize: 8_192, requestTimeout: 10_000 })
    await new Promise<void>((resolve, reject) => {
      server.once('error', (cause) =>
        reject(portTaken('the dashboard', { host: '127.0.0.1', port: options.port }, cause)),
      )
      server.listen(options.port, '127.0.0.1', resolve)
    })
    const { port } = server.address() as AddressInfo
    const http = new HttpServer(options, server, port)
    server.on('request', (request, response) => void http.#answer(request, response))
    server.on('upgrade', (request, socket, head) => http.#upgrade(request, socket, head))
    return http
  }

  get url(): string {
    return `http://127.0.0.1:${this.port}/`
  }

  /** Opens the page once, within ten minutes. */
  newTicketUrl(): string {
    return `${this.url}?ticket=${this.options.access.newTicket()}`
  }

  async close(): Promise<void> {
    for (const client of this.#sockets.clients) client.close(1001, 'the coordinator ends')
    this.#sockets.close()
    const closed = new Promise<void>((resolve) => this.server.close(() => resolve()))
    this.server.closeAllConnections()
    await closed
  }

  async #answer(request: IncomingMessage, response: ServerResponse): Promise<void> {
    setSecurityHeaders(response)
    try {
      if (!this.#isLocalHost(request) || !this.#isOwnOrigin(request, true)) {
        return refuse(response, 403, 'This page is served to this machine only.')
      }
      if (request.method !== 'GET' && request.method !== 'HEAD') {
        return refuse(response, 405, 'Only GET is served here.')
      }
      const url = new URL(request.url ?? '/', this.url)
      const ticket = url.searchParams.get('ticket')
      if (ticket !== null) return this.#redeem(ticket, url, response)
      if (!this.#hasCookie(request)) return refuse(response, 401, howToEnter)
      await this.#sendFile(url.pathname, request, response)
    } catch (error) {
      this.options.log.warn({ err: error }, 'a page could not be served')
      if (!response.headersSent) refuse(response, 500, 'The page could not be read.')
      else response.destroy()
    }
  }

  #upgrade(request: IncomingMessage, socket: Duplex, head: Buffer): void {
    socket.on('error', () => socket.destroy())
    const isAllowed =
      this.#isLocalHost(request) && this.#isOwnOrigin(request, false) && this.#hasCookie(request)
    // Compared as text: what a stranger asks for need not be an address at all.
    const isLive = request.url?.split('?')[0] === '/live'
    if (!isAllowed || !isLive || this.#sockets.clients.size >= maxClients) {
      socket.end(`HTTP/1.1 ${isAllowed ? '404 Not Found' : '401 Unauthorized'}\r\n\r\n`)
      return
    }
    this.#sockets.handleUpgrade(request, socket, head, (client) =>
      serveLiveFeed(client, this.options.feed, this.options.log),
    )
  }

  /** The ticket leaves the address bar, the cookie stays: not for scripts, not for other sites. */
  #redeem(ticket: string, url: URL, response: ServerResponse): void {
    const cookie = this.options.access.redeem(ticket)
    if (cookie === null) return refuse(response, 401, howToEnter)
    url.searchParams.delete('ticket')
    response.writeHead(303, {
      'set-cookie': `${this.#cookieName}=${cookie}; Path=/; HttpOnly; SameSite=Strict`,
      location: `${url.pathname}${url.search}`,
    })
    response.end()
  }

  async #sendFile(
    pathname: string,
    request: IncomingMessage,
    response: ServerResponse,
  ): Promise<void> {
    const path = fileBeneath(this.options.pagesDir, pathname)
    const found = path === null ? null : await stat(path).catch(() => null)
    if (path === null || !found?.isFile()) return refuse(response, 404, 'There is no such page.')
    response.writeHead(200, {
      'content-type': contentTypes[extname(path)] ?? 'application/octet-stream',
      'content-length': found.size,
      // Built files carry their hash in the name; the page itself is asked for anew.
      'cache-control': pathname.startsWith('/assets/') ? 'private, max-age=31536000' : 'no-store',
    })
    if (request.method === 'HEAD') response.end()
    else
      createReadStream(path)
        .on('error', () => response.destroy())
        .pipe(response)
  }

  /** Cookies do not tell ports apart, and two coordinators may run. */
  get #cookieName(): string {
    return `tunemesh-${this.port}`
  }

  #hasCookie(request: IncomingMessage): boolean {
    const cookies = (request.headers.cookie ?? '').split(/; */)
    const prefix = `${this.#cookieName}=`
    const cookie = cookies.find((text) => text.startsWith(prefix))
    return cookie !== undefined && this.options.access.isValid(cookie.slice(prefix.length))
  }

  /** A foreign name that was made to point here (DNS rebinding) is refused. */
  #isLocalHost(request: IncomingMessage): boolean {
    return this.#hosts.includes(request.headers.host ?? '')
  }

  /** A browser names the page that asks; a plain navigation names none, a websocket always does. */
  #isOwnOrigin(request: IncomingMessage, mayBeAbsent: boolean): boolean {
    const { origin, host } = request.headers
    return origin === undefined ? mayBeAbsent : origin === `http://${host}`
  }

  get #hosts(): string[] {
    return [`127.0.0.1:${this.port}`, `localhost:${this.port}`]
  }
}

/** null: outside the folder. */
function fileBeneath(dir: string, pathname: string): string | null {
  let decoded: string
  try {
    decoded = decodeURIComponent(pathname)
  } catch {
    return null
  }
  if (decoded.includes('\0') || decoded.includes('\\')) return null
  const path = normalize(join(dir, decoded === '/' ? 'index.html' : decoded))
  return path.startsWith(normalize(dir) + sep) ? path : null
}

function setSecurityHeaders(response: ServerResponse): void {
  response.setHeader(
    'content-security-policy',
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; " +
      "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; " +
      "frame-ancestors 'none'",
  )
  response.setHeader('x-content-type-options', 'nosniff')
  response.setHeader('referrer-policy', 'no-referrer')
  response.setHeader('cross-origin-resource-policy', 'same-origin')
}

const howToEnter =
  'This address opens once. Take the newest one that tunemesh printed, or restart `tunemesh up`.'

function refuse(response: ServerResponse, status: number, text: string): void {
  response.writeHead(status, { 'content-type': 'text/plain; charset=utf-8' })
  response.end(`${text}\n`)
}
