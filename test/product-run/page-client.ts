/** What a browser does with the address that `Dashboard` shows, without one: page and live feed. */
import assert from 'node:assert/strict'
import { WebSocket } from 'ws'
import type { FromCoordinator } from '../../proto/live-feed.js'

export class PageClient {
  readonly #steps = new Map<string, number[]>()
  #numWorkers = 0
  readonly #followed = new Set<string>()

  private constructor(
    readonly numFiles: number,
    private readonly socket: WebSocket,
  ) {
    socket.on('message', (data) => this.#receive(JSON.parse(String(data)) as FromCoordinator))
  }

  /** Redeems the ticket, fetches the page and every file that it names, opens the feed. */
  static async open(address: string): Promise<PageClient> {
    const { origin } = new URL(address)
    const entered = await fetch(address, { redirect: 'manual' })
    assert.equal(entered.status, 303, 'the ticket opens the page')
    const cookie = entered.headers.get('set-cookie')?.split(';')[0] ?? ''
    const again = await fetch(address, { redirect: 'manual' })
    assert.equal(again.status, 401, 'the ticket works once')
    const get = async (path: string) => {
      const answer = await fetch(new URL(path, origin), { headers: { cookie } })
      assert.equal(answer.status, 200, `${path} is served`)
      return answer.text()
    }
    const page = await get('/')
    const named = [...page.matchAll(/(?:src|href)="(\.?\/[^"]+)"/g)].map((match) => match[1] ?? '')
    assert.ok(named.length > 0, 'the page names its files')
    await Promise.all(named.map(get))
    const socket = new WebSocket(`${origin.replace('http', 'ws')}/live`, {
      headers: { cookie, origin },
    })
    const client = new PageClient(named.length + 1, socket)
    await new Promise((resolve, reject) => {
      socket.once('open', resolve)
      socket.once('error', reject)
    })
    return client
  }

  /** Steps of the job that the feed has told, in order; workers that it shows. */
  seen(jobId: string): { steps: number[]; numWorkers: number } {
    return { steps: this.#steps.get(jobId) ?? [], numWorkers: this.#numWorkers }
  }

  close(): void {
    this.socket.close()
  }

  #receive(message: FromCoordinator): void {
    if (message.type === 'fleet') this.#numWorkers = message.workers.length
    if (message.type === 'hello') for (const { jobId } of message.jobs) this.#follow(jobId)
    if (message.type !== 'events') return
    const told = message.events.flatMap(({ step }) => (step?.step ? [step.step] : []))
    this.#steps.set(message.jobId, [...(this.#steps.get(message.jobId) ?? []), ...told])
  }

  /** A page shows one job at a time: the newest comes last. */
  #follow(jobId: string): void {
    if (this.#followed.has(jobId)) return
    this.#followed.add(jobId)
    this.socket.send(JSON.stringify({ type: 'subscribe', jobId, afterSequence: 0 }))
  }
}
