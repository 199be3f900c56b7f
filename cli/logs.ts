/** `tunemesh logs [JOB] [-f]`: a job's events, from the first one; Ctrl-C leaves the job alone. */
import { newestJob } from './chosen-job.js'
import type { Context } from './context.js'
import { formatClock } from './format.js'
import { type Mesh, withMesh } from './mesh.js'
import { renderEvent } from './render-event.js'

export interface LogsOptions {
  follow: boolean
  after: number
}

/** Without -f, a running job's stored events are over when none has come for this long. */
const idleMs = 750

export async function logs(
  context: Context,
  asked: string | undefined,
  options: LogsOptions,
): Promise<void> {
  await withMesh(context, { numWorkers: 0, isHeld: true }, async (mesh) => {
    const jobId = asked ?? (await newestJob(mesh.client)).jobId
    const detach = new AbortController()
    const restore = context.interrupts.handle(() => detach.abort())
    const idle = new IdleTimer(options.follow ? null : idleMs)
    try {
      await print(context, mesh, {
        jobId,
        after: options.after,
        signal: AbortSignal.any([detach.signal, idle.signal, mesh.signal]),
        onEvent: () => idle.restart(),
      })
    } catch (error) {
      if (detach.signal.aborted) {
        context.output.note(`Left; the job goes on. Watch again: tunemesh logs -f ${jobId}`)
      } else if (!idle.signal.aborted) throw error
    } finally {
      idle.stop()
      restore()
    }
  })
}

async function print(
  { output }: Context,
  { client }: Mesh,
  what: { jobId: string; after: number; signal: AbortSignal; onEvent: () => void },
): Promise<void> {
  const { jobId, after, signal } = what
  const onReconnect = () => output.note('The coordinator does not answer; trying again…')
  for await (const event of client.watch(jobId, { afterSequence: after, signal, onReconnect })) {
    what.onEvent()
    output.record('event', event)
    const time = output.style.dim(formatClock(event.timeMs))
    for (const line of renderEvent(event, output.style)) output.line(`${time} ${line}`)
  }
}

/** Fires its signal when nothing has restarted it for a while; null: never. */
class IdleTimer {
  readonly #idle = new AbortController()
  #timer: NodeJS.Timeout | undefined

  constructor(private readonly afterMs: number | null) {
    this.restart()
  }

  get signal(): AbortSignal {
    return this.#idle.signal
  }

  restart(): void {
    clearTimeout(this.#timer)
    if (this.afterMs !== null) this.#timer = setTimeout(() => this.#idle.abort(), this.afterMs)
  }

  stop(): void {
    clearTimeout(this.#timer)
  }
}
