/** Wraps the handlers of all gRPC services: one place maps errors, one place limits time. */
import type * as grpc from '@grpc/grpc-js'
import type { Logger } from 'pino'
import { TunemeshError } from '../proto/errors.js'
import { rpcStatusOf } from '../proto/rpc-error.js'

/** A unary call without a deadline of its own gets this one. */
const longestUnaryMs = 120_000

export class RpcHandlers {
  constructor(private readonly log: Logger) {}

  unary<Request, Response>(
    handle: (
      request: Request,
      call: grpc.ServerUnaryCall<Request, Response>,
    ) => Promise<Response> | Response,
    longestMs = longestUnaryMs,
  ): grpc.handleUnaryCall<Request, Response> {
    return (call, callback) => {
      let isSettled = false
      const settle = (error: unknown, response?: Response) => {
        if (isSettled) return
        isSettled = true
        clearTimeout(timer)
        if (response === undefined) callback(this.#status(error))
        else callback(null, response)
      }
      const timer = setTimeout(() => settle(tooLong()), longestMs)
      Promise.resolve()
        .then(() => handle(call.request, call))
        .then(
          (response) => settle(null, response),
          (error) => settle(error),
        )
    }
  }

  /** `handle` writes the responses; its signal fires when the client has gone. */
  serverStream<Request, Response>(
    handle: (request: Request, out: ResponseWriter<Response>) => Promise<void>,
  ): grpc.handleServerStreamingCall<Request, Response> {
    return (call) => {
      const out = new ResponseWriter(call)
      handle(call.request, out).then(
        () => call.end(),
        (error) => {
          if (!out.signal.aborted) call.emit('error', this.#status(error))
        },
      )
    }
  }

  clientStream<Request, Response>(
    handle: (requests: AsyncIterable<Request>) => Promise<Response>,
  ): grpc.handleClientStreamingCall<Request, Response> {
    return (call, callback) => {
      handle(call as unknown as AsyncIterable<Request>).then(
        (response) => callback(null, response),
        (error) => callback(call.cancelled ? null : this.#status(error)),
      )
    }
  }

  #status(error: unknown): grpc.ServerErrorResponse {
    if (!(error instanceof TunemeshError)) this.log.error({ err: error }, 'a call failed')
    const { code, details, metadata } = rpcStatusOf(error)
    return Object.assign(new Error(details), { code, details, metadata })
  }
}

/** Writes to a client no faster than it reads. */
export class ResponseWriter<Response> {
  readonly #ended = new AbortController()

  constructor(private readonly call: grpc.ServerWritableStream<unknown, Response>) {
    const end = () => this.#ended.abort()
    call.on('cancelled', end)
    call.on('close', end)
    call.on('error', end)
  }

  get signal(): AbortSignal {
    return this.#ended.signal
  }

  async write(response: Response): Promise<void> {
    if (this.signal.aborted) throw new TunemeshError('JOB_STOPPED', 'The client has gone.')
    if (this.call.write(response)) return
    await new Promise<void>((resolve) => {
      const go = () => {
        this.call.off('drain', go)
        this.signal.removeEventListener('abort', go)
        resolve()
      }
      this.call.on('drain', go)
      this.signal.addEventListener('abort', go)
    })
  }
}

const tooLong = () =>
  new TunemeshError(
    'DEADLINE_EXCEEDED',
    'The call took longer than the coordinator allows. Its outcome is unknown; ask again.',
  )
