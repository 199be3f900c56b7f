/**
 * Every failure that a person or a program can meet: code → gRPC status, retry or not, exit code.
 * The only such table. docs/errors.md explains each code; a test keeps the two complete.
 */
import { status } from '@grpc/grpc-js'

interface ErrorKind {
  /** gRPC status the code travels under. */
  grpc: number
  /** May the same call be sent again unchanged? */
  retry: boolean
  /**
   * Exit code of the command line: 2 the user's mistake, 3 the job failed, 4 nobody to talk to, 1
   * ours.
   */
  exit: 1 | 2 | 3 | 4
}

const user = (grpc: number): ErrorKind => ({ grpc, retry: false, exit: 2 })
const failed = (grpc: number): ErrorKind => ({ grpc, retry: false, exit: 3 })
const passing: ErrorKind = { grpc: status.UNAVAILABLE, retry: true, exit: 4 }

export const errorKinds = {
  // what a user can mend
  JOB_INVALID: user(status.INVALID_ARGUMENT),
  MODEL_NOT_FOUND: user(status.NOT_FOUND),
  MODEL_INVALID: user(status.INVALID_ARGUMENT),
  MODEL_UNSUPPORTED: user(status.INVALID_ARGUMENT),
  SAFETENSORS_INVALID: user(status.INVALID_ARGUMENT),
  GGUF_INVALID: user(status.INVALID_ARGUMENT),
  TOKENIZER_INVALID: user(status.INVALID_ARGUMENT),
  CHAT_TEMPLATE_INVALID: user(status.INVALID_ARGUMENT),
  ADAPTER_INVALID: user(status.INVALID_ARGUMENT),
  DATA_INVALID: user(status.INVALID_ARGUMENT),
  DATA_EMPTY: user(status.INVALID_ARGUMENT),
  OUTPUT_IN_USE: user(status.FAILED_PRECONDITION),
  PORT_TAKEN: user(status.FAILED_PRECONDITION),
  STATE_IN_USE: user(status.FAILED_PRECONDITION),
  NATS_SERVER_MISSING: user(status.FAILED_PRECONDITION),
  NATS_SERVER_TOO_OLD: user(status.FAILED_PRECONDITION),
  NATS_NOT_SYNCHRONOUS: user(status.FAILED_PRECONDITION),
  BUILD_TOOL_MISSING: user(status.FAILED_PRECONDITION),
  ENGINE_MISSING: user(status.FAILED_PRECONDITION),
  ENGINE_OUTDATED: user(status.FAILED_PRECONDITION),
  LIBRARIES_NOT_FETCHED: user(status.FAILED_PRECONDITION),
  WHEEL_CORRUPT: user(status.DATA_LOSS),
  DEVICE_MEMORY_SHORT: user(status.RESOURCE_EXHAUSTED),
  JOB_NOT_FOUND: user(status.NOT_FOUND),
  BLOB_NOT_FOUND: user(status.NOT_FOUND),
  NOT_AUTHENTICATED: user(status.UNAUTHENTICATED),
  JOIN_REFUSED: user(status.PERMISSION_DENIED),
  CERTIFICATE_INVALID: user(status.UNAUTHENTICATED),
  HOST_REVOKED: user(status.PERMISSION_DENIED),
  TLS_REQUIRED: user(status.FAILED_PRECONDITION),
  STATE_CONFLICT: user(status.FAILED_PRECONDITION),
  // failures of a job
  NON_FINITE_GRADIENT: failed(status.ABORTED),
  GRADIENT_OUT_OF_RANGE: failed(status.ABORTED),
  REPLAY_DIVERGED: failed(status.ABORTED),
  DIGEST_MISMATCH: failed(status.DATA_LOSS),
  BLOB_CORRUPT: failed(status.DATA_LOSS),
  DISK_FULL: failed(status.RESOURCE_EXHAUSTED),
  WORKER_FAILED: failed(status.ABORTED),
  DEVICE_FAILED: failed(status.ABORTED),
  NO_WORKERS: failed(status.ABORTED),
  JOB_STOPPED: failed(status.CANCELLED),
  // passing or internal
  COORDINATOR_UNREACHABLE: passing,
  NATS_UNREACHABLE: passing,
  DEADLINE_EXCEEDED: { grpc: status.DEADLINE_EXCEEDED, retry: true, exit: 4 },
  STALE_EPOCH: { grpc: status.FAILED_PRECONDITION, retry: false, exit: 1 },
  COMMIT_CONFLICT: { grpc: status.ABORTED, retry: false, exit: 1 },
  FRAME_INVALID: { grpc: status.DATA_LOSS, retry: true, exit: 1 },
  VERSION_MISMATCH: { grpc: status.FAILED_PRECONDITION, retry: false, exit: 2 },
  PLAN_MISMATCH: { grpc: status.FAILED_PRECONDITION, retry: false, exit: 2 },
  ENGINE_FAILED: { grpc: status.INTERNAL, retry: false, exit: 1 },
  INTERNAL: { grpc: status.INTERNAL, retry: false, exit: 1 },
} as const satisfies Record<string, ErrorKind>

export type ErrorCode = keyof typeof errorKinds

/** An expected failure. The message says what failed, the value seen, the limit, and what to do. */
export class TunemeshError extends Error {
  override readonly name = 'TunemeshError'
  /** Further problems of the same kind, each a complete line. */
  readonly details: string[]

  constructor(
    readonly code: ErrorCode,
    message: string,
    options: { details?: string[]; cause?: unknown } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause })
    this.details = options.details ?? []
  }
}

export const isErrorCode = (text: unknown): text is ErrorCode =>
  typeof text === 'string' && Object.hasOwn(errorKinds, text)
