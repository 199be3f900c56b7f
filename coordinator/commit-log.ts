/**
 * The one truth about each job: a stream of records, appended by compare-and-set on the subject's
 * last sequence. What the records mean stands in proto/commit-record.ts.
 */
import {
  type CommitLogRecord,
  decodeRecord,
  encodeRecord,
  type LoggedRecord,
} from '../proto/commit-record.js'
import { readSubject } from '../proto/nats-client.js'
import { commitStream, commitSubject } from '../proto/subjects.js'
import { type AppendResult, fileStorage, type NatsConnection } from './nats-connection.js'

export class CommitLog {
  private constructor(private readonly connection: NatsConnection) {}

  static async open(connection: NatsConnection): Promise<CommitLog> {
    await connection.ensureStream({
      name: commitStream,
      subjects: [commitSubject('*')],
      storage: fileStorage,
      allow_direct: true,
      deny_delete: true,
      deny_purge: true,
    })
    return new CommitLog(connection)
  }

  /**
   * `unknown` is not failure: the record may be stored, now or a little later. Read the last one
   * and compare; where it does not stand, append again with the same `expectedLast`, so that at
   * most one of the tries counts.
   */
  append(job: string, record: CommitLogRecord, expectedLast: number): Promise<AppendResult> {
    return this.connection.append(commitSubject(job), encodeRecord(record), expectedLast)
  }

  /** From the stream's leader, never from a cache. */
  async readLast(job: string): Promise<LoggedRecord | null> {
    const message = await this.connection.readLast(commitStream, commitSubject(job))
    if (message === null) return null
    return { sequence: message.sequence, record: decodeRecord(message.data) }
  }

  async readAll(job: string): Promise<LoggedRecord[]> {
    const query = { stream: commitStream, subject: commitSubject(job), fromSequence: 1 }
    const records: LoggedRecord[] = []
    for await (const { sequence, data } of readSubject(this.connection, query)) {
      records.push({ sequence, record: decodeRecord(data) })
    }
    return records
  }
}
