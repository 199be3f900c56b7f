/** Threads that tokenise, so that the coordinator's event loop never waits for text. */
import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import { isErrorCode, TunemeshError } from '../proto/errors.js'
import type { ThreadData, ThreadMethods, ThreadReply, ThreadRequest } from './tokenizer-thread.js'

/** Requests that wait in a thread's mailbox; a caller beyond them waits for its turn. */
const requestsPerThread = 2

const mostThreads = 4

interface Pending {
  resolve(value: unknown): void
  reject(error: Error): void
}

interface Thread {
  worker: Worker
  pending: Map<number, Pending>
}

export class TokenizerPool {
  private readonly threads: Thread[] = []
  private readonly waiting: (() => void)[] = []
  private nextId = 1
  private failure: Error | null = null

  /** Threads start at once and read the tokenizer when they are first asked. */
  constructor(data: ThreadData, numThreads = defaultThreads()) {
    for (let i = 0; i < numThreads; i += 1) this.threads.push(this.startThread(data))
  }

  get numThreads(): number {
    return this.threads.length
  }

  /** Runs one of the threads' methods on the least busy thread. */
  async call<Name extends keyof ThreadMethods>(
    method: Name,
    ...args: Parameters<ThreadMethods[Name]>
  ): Promise<Awaited<ReturnType<ThreadMethods[Name]>>> {
    const thread = await this.freeThread()
    const id = this.nextId
    this.nextId += 1
    const answer = new Promise((resolve, reject) => {
      thread.pending.set(id, { resolve, reject })
      thread.worker.ref()
      thread.worker.postMessage({ id, method, args } satisfies ThreadRequest)
    })
    return answer as Promise<Awaited<ReturnType<ThreadMethods[Name]>>>
  }

  async close(): Promise<void> {
    this.fail(new TunemeshError('INTERNAL', 'The tokenizer was closed while it was in use.'))
    await Promise.all(this.threads.map(({ worker }) => worker.terminate()))
  }

  private async freeThread(): Promise<Thread> {
    for (;;) {
      if (this.failure) throw this.failure
      const [first] = [...this.threads].sort((a, b) => a.pending.size - b.pending.size)
      if (first && first.pending.size < requestsPerThread) return first
      await new Promise<void>((resolve) => this.waiting.push(resolve))
    }
  }

  private startThread(data: ThreadData): Thread {
    const worker = newWorker(data)
    const thread: Thread = { worker, pending: new Map() }
    worker.on('message', (reply: ThreadReply) => this.settle(thread, reply))
    worker.on('error', (error) => this.fail(error))
    worker.on('exit', (code) => {
      this.fail(new TunemeshError('INTERNAL', `A tokenising thread ended with exit code ${code}.`))
    })
    // A pool that nobody uses does not keep the process alive.
    worker.unref()
    return thread
  }

  private settle(thread: Thread, reply: ThreadReply): void {
    const pending = thread.pending.get(reply.id)
    thread.pending.delete(reply.id)
    if (thread.pending.size === 0) thread.worker.unref()
    this.waiting.shift()?.()
    if (!('error' in reply)) pending?.resolve(reply.value)
    else {
      const { code, message, details } = reply.error
      const known = isErrorCode(code) ? code : 'INTERNAL'
      pending?.reject(new TunemeshError(known, message, { details }))
    }
  }

  private fail(error: Error): void {
    this.failure ??= error
    for (const { pending } of this.threads) {
      for (const { reject } of pending.values()) reject(this.failure)
      pending.clear()
    }
    for (const wake of this.waiting.splice(0)) wake()
  }
}

const defaultThreads = () => Math.max(1, Math.min(mostThreads, availableParallelism() - 1))

/** In the source tree the entry is TypeScript, and Node 20 gives tsx's loader to no thread. */
function newWorker(data: ThreadData): Worker {
  const isSource = import.meta.url.endsWith('.ts')
  const entry = new URL(`./tokenizer-thread.${isSource ? 'ts' : 'js'}`, import.meta.url)
  if (!isSource) return new Worker(entry, { workerData: data })
  const loader = import.meta.resolve('tsx/esm/api')
  const start = `import(${JSON.stringify(loader)}).then((tsx) => {
    tsx.register()
    return import(${JSON.stringify(entry.href)})
  })`
  return new Worker(start, { eval: true, workerData: data, execArgv: [] })
}
