/** One unary call, one stream: deadline, token and errors the same everywhere. */
import {
  type CallOptions,
  type ClientReadableStream,
  Metadata,
  type requestCallback,
} from '@grpc/grpc-js'
import { errorOfRpc } from '../proto/rpc-error.js'
import { abortReason } from './retry.js'

/**
 * Sends a unary request through a generated client: `(m, o, done) => jobs.get(request, m, o,
 * done)`.
 */
export type StartUnary<Response> = (
  metadata: Metadata,
  options: CallOptions,
  done: requestCallback<Response>,
) => unknown

export type StartStream<Response> = (
  metadata: Metadata,
  options: CallOptions,
) => ClientReadableStream<Response>

export interface CallContext {
  token: string
  deadlineMs: number
  signal?: AbortSignal | undefined
}

export function metadataWith(token: string): Metadata {
  const metadata = new Metadata()
  // A joined host's certificate speaks for it.
  if (token !== '') metadata.set('authorization', `Bearer ${token}`)
  return metadata
}

export function callOnce<Response>(
  start: StartUnary<Response>,
  context: CallContext,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    const options = { deadline: Date.now() + context.deadlineMs }
    start(metadataWith(context.token), options, (error, response) => {
      if (error) reject(errorOfRpc(error))
      else resolve(response as Response)
    })
  })
}

/** Yields a stream's messages; leaving the loop early, or the signal, cancels the call. */
export async function* readStream<Response>(
  start: StartStream<Response>,
  context: CallContext,
): AsyncGenerator<Response, void, undefined> {
  const { signal } = context
  if (signal?.aborted) throw abortReason(signal)
  const stream = start(metadataWith(context.token), { deadline: Date.now() + context.deadlineMs })
  const cancel = () => stream.cancel()
  signal?.addEventListener('abort', cancel, { once: true })
  // After an early exit the cancelled call still reports its end: nobody is left to hear it.
  stream.on('error', () => {})
  try {
    for await (const message of stream) yield message as Response
  } catch (error) {
    throw signal?.aborted ? abortReason(signal) : errorOfRpc(error)
  } finally {
    signal?.removeEventListener('abort', cancel)
    stream.cancel()
  }
}
