// Generates static TypeScript types of the .proto files into proto/gen (not committed).
// The options are those of proto/services.ts.
import { execFileSync } from 'node:child_process'
import { rmSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const top = fileURLToPath(new URL('..', import.meta.url))
rmSync(`${top}proto/gen`, { recursive: true, force: true })
execFileSync(
  process.execPath,
  [
    `${top}node_modules/@grpc/proto-loader/build/bin/proto-loader-gen-types.js`,
    'job.proto',
    'worker.proto',
    'blob.proto',
    'join.proto',
    '--longs=Number',
    '--enums=String',
    '--defaults',
    '--oneofs',
    '--grpcLib=@grpc/grpc-js',
    '--importFileExtension=.js',
    '--outDir=proto/gen',
    '--includeDirs=proto',
  ],
  { cwd: top, stdio: 'inherit' },
)
