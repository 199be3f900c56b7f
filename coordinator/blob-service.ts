/** BlobService: moves bytes between sockets and the blob store, and parses none. */

import { TunemeshError } from '../proto/errors.js'
import type { BlobServiceHandlers } from '../proto/gen/tunemesh/v1/BlobService.js'
import type { GetBlobRequest__Output } from '../proto/gen/tunemesh/v1/GetBlobRequest.js'
import type { GetBlobResponse } from '../proto/gen/tunemesh/v1/GetBlobResponse.js'
import type { PutBegin__Output } from '../proto/gen/tunemesh/v1/PutBegin.js'
import type { PutRequest__Output } from '../proto/gen/tunemesh/v1/PutRequest.js'
import { blobPieceBytes } from '../proto/services.js'
import type { BlobStore } from './blob-store.js'
import type { ResponseWriter, RpcHandlers } from './rpc-handlers.js'

export function blobHandlers(store: BlobStore, rpc: RpcHandlers): BlobServiceHandlers {
  return {
    Put: rpc.clientStream((requests) => put(store, requests)),
    Get: rpc.serverStream((request: GetBlobRequest__Output, out: ResponseWriter<GetBlobResponse>) =>
      get(store, request, out),
    ),
    Stat: rpc.unary(({ digest }) => {
      const status = store.status(digest)
      return status.complete
        ? { complete: true, sizeBytes: status.sizeBytes, localPath: status.path }
        : { complete: false, receivedBytes: status.receivedBytes }
    }),
  }
}

async function put(store: BlobStore, requests: AsyncIterable<PutRequest__Output>) {
  const iterator = requests[Symbol.asyncIterator]()
  const first = await iterator.next()
  const begin: PutBegin__Output | null | undefined = first.done ? null : first.value.begin
  if (!begin) throw badUpload('the first message must be `begin`')
  if (begin.sizeBytes < 0 || begin.offset < 0 || begin.offset > begin.sizeBytes) {
    throw badUpload(`offset ${begin.offset} does not lie within ${begin.sizeBytes} bytes`)
  }
  return store.put(begin, pieces({ [Symbol.asyncIterator]: () => iterator }))
}

async function* pieces(requests: AsyncIterable<PutRequest__Output>): AsyncGenerator<Uint8Array> {
  for await (const { data } of requests) {
    if (!data) throw badUpload('`begin` came twice')
    if (data.length > blobPieceBytes) throw badUpload(`a piece has ${data.length} bytes`)
    yield data
  }
}

async function get(
  store: BlobStore,
  request: GetBlobRequest__Output,
  out: ResponseWriter<GetBlobResponse>,
): Promise<void> {
  const status = store.status(request.digest)
  if (!status.complete) {
    throw new TunemeshError('BLOB_NOT_FOUND', `Blob ${request.digest} is not in the store.`)
  }
  let offset = request.offset
  if (offset < 0 || offset > status.sizeBytes) {
    throw badUpload(`offset ${offset} does not lie within ${status.sizeBytes} bytes`)
  }
  if (offset === status.sizeBytes) await out.write({ offset, totalBytes: status.sizeBytes })
  for await (const data of store.read(request.digest, offset)) {
    await out.write({ data, offset, totalBytes: status.sizeBytes })
    offset += data.length
  }
}

const badUpload = (reason: string) =>
  new TunemeshError(
    'BLOB_CORRUPT',
    `The transfer is malformed: ${reason}. Pieces are at most ${blobPieceBytes} bytes.`,
  )
