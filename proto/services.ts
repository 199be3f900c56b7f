/**
 * The gRPC contract, loaded once: service definitions, options that both ends share, client
 * constructors.
 */
import { fileURLToPath } from 'node:url'
import * as grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'
import type { ProtoGrpcType as BlobTypes } from './gen/blob.js'
import type { ProtoGrpcType as JobTypes } from './gen/job.js'
import type { ProtoGrpcType as JoinTypes } from './gen/join.js'
import type { ProtoGrpcType as WorkerTypes } from './gen/worker.js'

/** Folder of the .proto files, beside this file in the source tree and in build/. */
const protoDir = fileURLToPath(new URL('.', import.meta.url))

const protoFiles = ['job.proto', 'worker.proto', 'blob.proto', 'join.proto']

/** The same options generate the static types (scripts/gen.mjs); change both together. */
export const packageDefinition = loadSync(protoFiles, {
  includeDirs: [protoDir],
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
})

const types = grpc.loadPackageDefinition(packageDefinition) as unknown as JobTypes &
  WorkerTypes &
  BlobTypes &
  JoinTypes

export const { JobService, WorkerService, BlobService, JoinService } = types.tunemesh.v1

/** Bytes of one piece of a blob on the wire. */
export const blobPieceBytes = 1 << 20

/**
 * Limits and keepalive, the same on both ends: a server that allows fewer pings than its clients
 * send cuts them.
 */
export const channelOptions: grpc.ChannelOptions = {
  'grpc.max_receive_message_length': 4 << 20,
  'grpc.max_send_message_length': 4 << 20,
  // A link that is gone is noticed within 20 s. The answer to a ping may queue behind files.
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 10_000,
  'grpc.initial_reconnect_backoff_ms': 200,
  'grpc.max_reconnect_backoff_ms': 2_000,
  'grpc.keepalive_permit_without_calls': 1,
  'grpc-node.flow_control_window': 8 << 20,
}

export const serverOptions: grpc.ChannelOptions = {
  ...channelOptions,
  'grpc.http2.min_ping_interval_without_data_ms': 5_000,
  'grpc.max_concurrent_streams': 100,
}
