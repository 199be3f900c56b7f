/**
 * What a running coordinator's nats-server knows: a job's commit log, and who sent how many bytes.
 */
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { CommitLog } from '../../coordinator/commit-log.js'
import { NatsConnection } from '../../coordinator/nats-connection.js'
import type { LoggedRecord } from '../../proto/commit-record.js'

type User = 'coordinator' | 'worker' | 'system'

async function withNats<Result>(
  stateDir: string,
  user: User,
  use: (connection: NatsConnection) => Promise<Result>,
): Promise<Result> {
  const config = readFileSync(join(stateDir, 'nats', 'nats-server.conf'), 'utf8')
  const port = /^port: (\d+)$/m.exec(config)?.[1]
  const password = new RegExp(`user: ${user}, password: "([^"]+)"`).exec(config)?.[1] ?? ''
  const address = { url: `nats://127.0.0.1:${port}`, user, password }
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
  authorized_user: string
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
      data: { connections: ConnectionStatistics[] }
    }
    return data.connections
  })
