/** The connection to NATS that the newest Welcome names: opened when first needed, once. */
import { TunemeshError } from '../proto/errors.js'
import type { NatsAddress } from './nats-connection.js'

type Open<Connection> = (address: NatsAddress) => Promise<Connection>

export class DataBus<Connection extends { close(): Promise<void> }> {
  #address: NatsAddress | null = null
  #opening: Promise<Connection> | null = null
  #connection: Connection | null = null

  constructor(private readonly open: Open<Connection>) {}

  /** A restarted coordinator may have another server or another password: the old one ends. */
  moveTo(address: NatsAddress): void {
    const old = this.#address
    this.#address = address
    const isSame = old?.url === address.url && old.password === address.password
    if (old !== null && !isSame) void this.close()
  }

  /** A failed opening is forgotten, so that the next one to ask tries again. */
  connection(): Promise<Connection> {
    if (this.#opening !== null) return this.#opening
    if (this.#address === null) return Promise.reject(outdated('no coordinator has welcomed it'))
    const opening: Promise<Connection> = this.open(this.#address).then(
      async (connection) => {
        if (this.#opening === opening) {
          this.#connection = connection
          return connection
        }
        await connection.close()
        throw outdated('the coordinator named another one meanwhile')
      },
      (error: unknown) => {
        if (this.#opening === opening) this.#opening = null
        throw error
      },
    )
    this.#opening = opening
    return opening
  }

  /** Does not wait for one that is still being opened: it closes itself once it is there. */
  async close(): Promise<void> {
    const connection = this.#connection
    this.#opening = null
    this.#connection = null
    await connection?.close()
  }
}

const outdated = (reason: string) =>
  new TunemeshError('NATS_UNREACHABLE', `The worker has no data connection: ${reason}.`)
