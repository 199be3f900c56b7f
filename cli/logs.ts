/** `tunemesh logs [JOB] [-f]`: a job's events, from the first one; Ctrl-C leaves the job alone. */
import { newestJob } from './chosen-job.js'
import type { Context } from './context.js'
import { formatClock } from './format.js'
import { loggingStepsOf } from './logging-steps.js'
import { hasEnded, type Mesh, withMesh } from './mesh.js'
import { isStepShown, renderEvent } from './render-event.js'

export interface LogsOptions {
  follow: boolean
  after: number
}

/** Without -f, a live job's stored events are over when none has come for this long. */
const idleMs = 750
/** The first one may take this long: a state folder with a long history is slow to open. */
const firstEventMs = 15_000

export async function logs(
  context: Context,
  asked: string | undefined,
  options: LogsOptions,
): Promise<void> {
  await withMesh(context, { numWorkers: 0, isHeld: true }, async (mesh) => {
    const jobId = asked ?? (await newestJob(mesh.client)).jobId
    const detach = new AbortController()
    const restore = context.interrupts.handle(() => detach.abort())
    const idle = new IdleTimer()
    try {
      // The events of a job that has ended have a last one; its watch ends by itself.
      const job = await mesh.client.get(jobId)
      const isTimed = !options.follow && !hasEnded(job)
      if (isTimed) idle.restart(firstEventMs)
      await print(context, mesh, {
        jobId,
        after: options.after,
        every: loggingStepsOf(job) ?? 1,
        signal: AbortSignal.any([detach.signal, idle.signal, mesh.signal]),
        onEvent: () => isTimed && idle.restart(idleMs),
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
  what: { jobId: string; after: number; every: number; signal: AbortSignal; onEvent: () => void },
): Promise<void> {
  const { jobId, after, signal } = what
  const onReconnect = () => output.note('The coordinator does not answer; trying again…')
  for await (const event of client.watch(jobId, { afterSequence: after, signal, onReconnect })) {
    what.onEvent()
    output.record('event', event)
    if (event.step && !isStepShown(event.step, what.every)) continue
    const time = output.style.dim(formatClock(event.timeMs))
    for (const line of renderEvent(event, output.style)) output.line(`${time} ${line}`)
  }
}

/** Fires its signal when nothing has restarted it for as long as it was last given. */
class IdleTimer {
  readonly #idle = new AbortController()
  #timer: NodeJS.Timeout | undefined

  get signal(): AbortSignal {
    return this.#idle.signal
  }

  restart(afterMs: number): void {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#idle.abort(), afterMs)
  }

  stop(): void {
    clearTimeout(this.#timer)
  }
}
