/** Calls of worker hosts that are under way on the TLS port, so that those of one can be ended. */
import type { ServerInterceptingCallInterface } from '@grpc/grpc-js'
import type { TunemeshError } from '../proto/errors.js'
import { rpcStatusOf } from '../proto/rpc-error.js'

type Call = Pick<ServerInterceptingCallInterface, 'sendStatus'>

export class HostCalls {
  readonly #calls = new Map<string, Set<Call>>()

  /** @returns what to do when it has ended */
  began(hostId: string, call: Call): () => void {
    const calls = this.#calls.get(hostId) ?? new Set()
    this.#calls.set(hostId, calls.add(call))
    return () => {
      calls.delete(call)
      if (calls.size === 0 && this.#calls.get(hostId) === calls) this.#calls.delete(hostId)
    }
  }

  /** Each hears the reason. */
  end(hostId: string, reason: TunemeshError): void {
    for (const call of [...(this.#calls.get(hostId) ?? [])]) call.sendStatus(rpcStatusOf(reason))
    this.#calls.delete(hostId)
  }
}
