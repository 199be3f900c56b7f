/**
 * What a running coordinator's nats-server knows: a job's commit log, and who sent how many bytes.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { CommitLog } from '../../coordinator/commit-log.js'
import { coordinatorUser, type NatsSeeds, systemUser } from '../../coordinator/nats-accounts.js'
import { NatsConnection } from '../../coordinator/nats-connection.js'
import type { LoggedRecord } from '../../proto/commit-record.js'

type User = 'coordinator' | 'system'

async function withNats<Result>(
  stateDir: string,
  user: User,
  use: (connection: NatsConnection) => Promise<Result>,
): Promise<Result> {
  const text = readFileSync(join(stateDir, 'nats', 'secrets.json'), 'utf8')
  const { port, seeds } = JSON.parse(text) as { port: number; seeds: NatsSeeds }
  const credentials = await (user === 'system' ? systemUser : coordinatorUser)(seeds)
  const address = { url: `nats://127.0.0.1:${port}`, user, credentials }
  const connection = await NatsConnection.open(address, 10_000)
  try {
    return await use(connection)
  } finally {
    await connection.close()
  }
}

export const readCommitLog = (stateDir: string, jobId: string): Promise<LoggedRecord[]> =>
  withNats(stateDir, 'coordinator', async (connection) =>
    (await CommitLog.open(connection)).readAll(jobId),
  )

export interface ConnectionStatistics {
  role: 'coordinator' | 'worker' | 'system'
  in_bytes: number
  out_bytes: number
  in_msgs: number
  out_msgs: number
}

/** What CONNZ calls `state`. */
const states = { open: 0, closed: 1 }

/** As nats-server itself counts them. */
export const connectionStatistics = (
  stateDir: string,
  state: keyof typeof states = 'open',
): Promise<ConnectionStatistics[]> =>
  withNats(stateDir, 'system', async (connection) => {
    const question = JSON.stringify({ auth: true, state: states[state] })
    const reply = await connection.request('$SYS.REQ.SERVER.PING.CONNZ', question)
    const { data } = JSON.parse(new TextDecoder().decode(reply)) as {
      data: { connections: (ConnectionStatistics & { name: string })[] }
    }
    return data.connections.map((connection) => ({
      ...connection,
      role: roleOf(connection.name),
    }))
  })

/** A connection is named by its user: a worker's by its id. */
const roleOf = (name: string) => (name === 'coordinator' || name === 'system' ? name : 'worker')
