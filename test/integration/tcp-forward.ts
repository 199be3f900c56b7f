/** One port of one address, forwarded to the same port of another: a link that a test can cut. */
import { once } from 'node:events'
import { connect, createServer, type Server, type Socket } from 'node:net'

export class TcpForward {
  readonly #sockets = new Set<Socket>()

  private constructor(private readonly server: Server) {}

  static async open(from: string, to: string, port: number): Promise<TcpForward> {
    const server = createServer()
    const forward = new TcpForward(server)
    server.on('connection', (socket) => forward.#join(socket, connect(port, to)))
    server.listen(port, from)
    await once(server, 'listening')
    return forward
  }

  /** All that is open breaks; new connections pass. */
  cut(): void {
    for (const socket of this.#sockets) socket.destroy()
  }

  async close(): Promise<void> {
    const closed = once(this.server, 'close')
    this.server.close()
    this.cut()
    await closed
  }

  #join(one: Socket, other: Socket): void {
    for (const [socket, peer] of [
      [one, other],
      [other, one],
    ] as const) {
      this.#sockets.add(socket)
      socket.on('error', () => {}) // the other end broke it
      socket.on('close', () => {
        this.#sockets.delete(socket)
        peer.destroy()
      })
      socket.pipe(peer)
    }
  }
}
