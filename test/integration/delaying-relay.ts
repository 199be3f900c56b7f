/** A slow line: relays the TCP ports of a mesh from another address of this machine. */
import { once } from 'node:events'
import { connect, createServer, type Server, type Socket } from 'node:net'

export interface RelayOptions {
  /** https://HOST:PORT of the mesh; gradients take the next port. */
  url: string
  /** Address that the relay listens on, at the same ports. */
  host: string
  /** Each way. */
  delayMs: number
  /** 1: gRPC alone. */
  numPorts?: number
}

export class DelayingRelay {
  numBytes = 0
  readonly #servers: Server[] = []
  readonly #sockets = new Set<Socket>()

  private constructor(private readonly options: RelayOptions) {}

  static async open(options: RelayOptions): Promise<DelayingRelay> {
    const relay = new DelayingRelay(options)
    const { port } = new URL(options.url)
    const { numPorts = 2 } = options
    for (let next = 0; next < numPorts; next++) await relay.#listen(Number(port) + next)
    return relay
  }

  get url(): string {
    const { url, host } = this.options
    return `https://${host}:${new URL(url).port}`
  }

  async close(): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    for (const server of this.#servers) {
      server.close()
      await once(server, 'close')
    }
  }

  async #listen(port: number): Promise<void> {
    const { url, host } = this.options
    const server = createServer((near) => {
      const far = connect({ host: new URL(url).hostname, port, noDelay: true })
      this.#relay(near, far)
      this.#relay(far, near)
    })
    server.listen(port, host)
    await once(server, 'listening')
    this.#servers.push(server)
  }

  /** In order, each piece so much later; a piece that comes later is never earlier. */
  #relay(from: Socket, to: Socket): void {
    const { delayMs } = this.options
    this.#sockets.add(from)
    from.on('data', (data: Buffer) => {
      this.numBytes += data.length
      setTimeout(() => to.writable && to.write(data), delayMs)
    })
    from.on('close', () => {
      this.#sockets.delete(from)
      setTimeout(() => to.destroy(), delayMs)
    })
    from.on('error', () => {}) // its 'close' follows
  }
}
