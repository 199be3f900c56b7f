// Submits a job, watches it and fetches the adapter, with grpc-js and the published .proto files
// alone. node build/examples/clients/submit-and-watch.js ENDPOINT.json JOB.yaml ADAPTER.safetensors
import { readFileSync, writeFileSync } from 'node:fs'
import { dirname, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import * as grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const [endpointPath = '', jobPath = '', adapterPath = ''] = process.argv.slice(2)
const { grpc: address, token } = JSON.parse(readFileSync(endpointPath, 'utf8'))

const protoDir = fileURLToPath(new URL('../../proto', import.meta.url))
const options = { includeDirs: [protoDir], longs: Number, enums: String, defaults: true }
const loaded = grpc.loadPackageDefinition(loadSync(['job.proto', 'blob.proto'], options))
// biome-ignore lint/suspicious/noExplicitAny: types are generated elsewhere; this example has none
const { JobService, BlobService } = (loaded.tunemesh as any).v1
const jobs = new JobService(address, grpc.credentials.createInsecure())
const blobs = new BlobService(address, grpc.credentials.createInsecure())
const metadata = new grpc.Metadata()
metadata.set('authorization', `Bearer ${token}`)

const submit = promisify(jobs.submit.bind(jobs))
const jobFile = readFileSync(jobPath, 'utf8')
const { jobId } = await submit({ jobFile, baseDir: resolve(dirname(jobPath)) }, metadata)
let state = ''
for await (const event of jobs.watch({ jobId }, metadata)) {
  state = event.stateChanged?.state ?? state
  if (event.step) console.log(`step ${event.step.step} loss ${event.step.loss.toFixed(4)}`)
}
const job = await promisify(jobs.get.bind(jobs))({ jobId }, metadata)
console.log(`${jobId} ${state} ${job.error?.message ?? ''}`)
if (state !== 'SUCCEEDED') process.exit(1)
const pieces: Buffer[] = []
for await (const piece of blobs.get({ digest: job.adapterDigest }, metadata))
  pieces.push(piece.data)
writeFileSync(adapterPath, Buffer.concat(pieces))
jobs.close()
blobs.close()
