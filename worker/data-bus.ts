/** The connection to NATS that the newest Welcome names: opened when first needed, once. */
import { TunemeshError } from '../proto/errors.js'
import type { NatsAddress, NatsCredentials } from '../proto/nats-client.js'

type Open<Connection> = (address: NatsAddress) => Promise<Connection>

interface Renewable {
  /** Takes credentials for its next reconnect. */
  renew(address: NatsAddress): void
  close(): Promise<void>
}

export class DataBus<Connection extends Renewable> {
  #address: NatsAddress | null = null
  #opening: Promise<Connection> | null = null
  #connection: Connection | null = null

  constructor(private readonly open: Open<Connection>) {}

  /** A restarted coordinator may have another server or know us by another id: the old one ends. */
  moveTo(address: NatsAddress): void {
    const old = this.#address
    this.#address = address
    if (old === null) return
    // The same server and user: what changed is when the credentials expire.
    if (old.url === address.url && old.user === address.user) this.#connection?.renew(address)
    else void this.close()
  }

  renew(credentials: NatsCredentials): void {
    if (this.#address !== null) this.moveTo({ ...this.#address, credentials })
  }

  /** A failed opening is forgotten, so that the next one to ask tries again. */
  connection(): Promise<Connection> {
    if (this.#opening !== null) return this.#opening
    if (this.#address === null) return Promise.reject(outdated('no coordinator has welcomed it'))
    const opening: Promise<Connection> = this.open(this.#address).then(
      async (connection) => {
        if (this.#opening === opening) {
          this.#connection = connection
          if (this.#address !== null) connection.renew(this.#address)
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
