/** A small package index on loopback, with a wheel made here. */
import { createHash } from 'node:crypto'
import { once } from 'node:events'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import type { AddressInfo } from 'node:net'
import { deflateRawSync } from 'node:zlib'
import type { Wheel } from '../../cli/library-wheels.js'

/** A zip archive of these files, all deflated but the first. */
function zipOf(files: Record<string, Buffer>): Buffer {
  const parts: Buffer[] = []
  const entries: Buffer[] = []
  let offset = 0
  for (const [index, [path, content]] of Object.entries(files).entries()) {
    const packed = index === 0 ? content : deflateRawSync(content)
    const name = Buffer.from(path)
    const header = Buffer.alloc(30)
    header.writeUInt32LE(0x04034b50, 0)
    header.writeUInt16LE(name.length, 26)
    header.writeUInt16LE(4, 28) // extra bytes, which the directory does not have
    const entry = Buffer.alloc(46)
    entry.writeUInt32LE(0x02014b50, 0)
    entry.writeUInt16LE(index === 0 ? 0 : 8, 10)
    entry.writeUInt32LE(packed.length, 20)
    entry.writeUInt32LE(content.length, 24)
    entry.writeUInt16LE(name.length, 28)
    entry.writeUInt32LE(offset, 42)
    parts.push(header, name, Buffer.alloc(4), packed)
    entries.push(entry, name)
    offset += 30 + name.length + 4 + packed.length
  }
  const directory = Buffer.concat(entries)
  const end = Buffer.alloc(22)
  end.writeUInt32LE(0x06054b50, 0)
  end.writeUInt16LE(entries.length / 2, 10)
  end.writeUInt32LE(directory.length, 12)
  end.writeUInt32LE(offset, 16)
  return Buffer.concat([...parts, directory, end])
}

/** Distinct bytes that hardly compress. */
const noise = (bytes: number) =>
  Buffer.from(Array.from({ length: bytes }, (_, i) => (i * 2654435761) >>> 24))

export const wheelFiles: Record<string, Buffer> = {
  'nvidia/fake/lib/libfake.so.1': noise(3 << 20),
  'nvidia/fake/lib/libfake_part.so.1': noise(100_003),
  'nvidia/fake/include/fake.h': Buffer.from('int fake;'),
}
export const wheelBytes = zipOf(wheelFiles)
export const fakeWheel: Wheel = {
  name: 'nvidia-fake',
  version: '1.0',
  file: 'nvidia_fake-1.0-py3-none-any.whl',
  sizeBytes: wheelBytes.length,
  sha256: createHash('sha256').update(wheelBytes).digest('hex'),
  keep: /\/lib\/libfake\w*\.so\.1$/,
  keptBytes: (3 << 20) + 100_003,
}

export class PackageIndex {
  /** What is served for the wheel. */
  content = wheelBytes
  isJson = false
  knowsRanges = true
  /** The next answers stop after so many bytes. */
  readonly cuts: number[] = []
  /** The ranges asked for; empty: none. */
  readonly ranges: string[] = []
  authorization: string | undefined
  readonly #server = createServer((request, response) => this.#answer(request, response))

  async start(): Promise<URL> {
    this.#server.listen(0, '127.0.0.1')
    await once(this.#server, 'listening')
    return new URL(`http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/simple`)
  }

  stop(): void {
    this.#server.closeAllConnections()
    this.#server.close()
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const { url, headers } = request
    this.authorization = headers.authorization
    if (url === `/simple/${fakeWheel.name}/`) this.#page(response)
    else if (url === `/files/${fakeWheel.file}`) this.#file(headers.range ?? '', response)
    else response.writeHead(404).end()
  }

  #page(response: ServerResponse): void {
    const url = `../../files/${fakeWheel.file}`
    const others = 'nvidia_fake-0.9-py3-none-any.whl'
    if (this.isJson) {
      const files = [
        { filename: others, url: `../../files/${others}` },
        { filename: fakeWheel.file, url },
      ]
      response.setHeader('content-type', 'application/vnd.pypi.simple.v1+json')
      response.end(JSON.stringify({ files }))
      return
    }
    response.setHeader('content-type', 'text/html')
    response.end(`<a href="../../files/${others}">x</a><a href="${url}#sha256=00">${url}</a>`)
  }

  #file(range: string, response: ServerResponse): void {
    this.ranges.push(range)
    const from = this.knowsRanges ? Number(/^bytes=(\d+)-$/.exec(range)?.[1] ?? 0) : 0
    const rest = this.content.subarray(from)
    if (from > 0) {
      response.statusCode = 206
      response.setHeader('content-range', `bytes ${from}-${this.content.length - 1}/*`)
    }
    response.setHeader('content-length', rest.length)
    const cut = this.cuts.shift()
    if (cut === undefined) response.end(rest)
    else response.write(rest.subarray(0, cut), () => response.destroy())
  }
}
