import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, test } from 'node:test'
import { fileStamp, type ModelFile } from '../../proto/model-file.js'
import { ModelCache, type ModelCacheOptions } from '../../worker/model-cache.js'

let folder: string
let cacheDir: string
let store: Map<string, string>
let fetched: string[]
const find = { signal: new AbortController().signal, onMoved: () => {} }

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'tunemesh-test-'))
  cacheDir = join(folder, 'cache')
  store = new Map()
  fetched = []
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const digestOf = (text: string) => `sha256:${createHash('sha256').update(text).digest('hex')}`

/** A file as the coordinator tells of it, with its bytes in the store. */
function told(name: string, text: string, stamp = 'of another disk'): ModelFile {
  const digest = digestOf(text)
  store.set(digest, text)
  return { name, digest, sizeBytes: text.length, stamp }
}

function here(name: string, text: string): string {
  mkdirSync(join(folder, 'model'), { recursive: true })
  const path = join(folder, 'model', name)
  writeFileSync(path, text)
  return path
}

const cacheOf = (options: Partial<ModelCacheOptions> = {}) =>
  new ModelCache({
    blobs: {
      fetch: async (digest, path) => {
        fetched.push(digest)
        writeFileSync(path, store.get(digest) ?? '')
      },
    },
    folder: cacheDir,
    patienceMs: 1_000,
    maxBytes: null,
    log: () => {},
    ...options,
  })
const place = (...files: ModelFile[]) => ({ path: join(folder, 'model'), files })

test('the very file that the coordinator has read is used in place, unread', async () => {
  const path = here('config.json', 'anything')
  const file = { ...told('config.json', 'anything'), digest: '' }
  const same = { ...file, stamp: fileStamp(statSync(path)) }
  assert.equal(await cacheOf().find(place(same), find), join(folder, 'model'))
})

test('a copy with the same bytes is used in place, and hashed once for all workers', async () => {
  here('config.json', 'shape')
  let hashed = 0
  const counted = { ...find, onMoved: (numBytes: number) => (hashed += numBytes) }
  const file = told('config.json', 'shape')
  assert.equal(await cacheOf().find(place(file), counted), join(folder, 'model'))
  assert.equal(await cacheOf().find(place(file), counted), join(folder, 'model'))
  assert.equal(hashed, 'shape'.length)
  assert.deepEqual(fetched, [])
})

test('only what is missing or differs is fetched; the rest is linked', async () => {
  here('config.json', 'shape')
  here('model.safetensors', 'weighty')
  const files = [told('config.json', 'shape'), told('model.safetensors', 'weights')]
  const found = await cacheOf().find(place(...files), find)
  assert.notEqual(found, join(folder, 'model'))
  assert.equal(readFileSync(join(found, 'config.json'), 'utf8'), 'shape')
  assert.equal(readFileSync(join(found, 'model.safetensors'), 'utf8'), 'weights')
  assert.deepEqual(fetched, [digestOf('weights')])
  assert.equal(await cacheOf().find(place(...files), find), found)
  assert.equal(fetched.length, 1)
})

test('a GGUF file is found under its own name', async () => {
  const path = join(folder, 'gone', 'tiny.gguf')
  const found = await cacheOf().find({ path, files: [told('tiny.gguf', 'all of it')] }, find)
  assert.match(found, /\/tiny\.gguf$/)
  assert.equal(readFileSync(found, 'utf8'), 'all of it')
})

test('files without a digest that are not here are an error that names them', async () => {
  const file = { ...told('config.json', 'shape'), digest: '' }
  await assert.rejects(cacheOf().find(place(file), find), {
    code: 'MODEL_NOT_FOUND',
    message: /config\.json of .*model/,
  })
})

test('a name with a folder in it is refused', async () => {
  for (const name of ['../config.json', '/etc/passwd', '', '.used']) {
    await assert.rejects(cacheOf().find(place(told(name, 'x')), find), { code: 'MODEL_INVALID' })
  }
})

test('two workers that need a model at once fetch it once', async () => {
  const file = told('model.safetensors', 'weights')
  let release = () => {}
  const held = new Promise<void>((resolve) => {
    release = resolve
  })
  const slow = cacheOf({
    blobs: {
      fetch: async (digest, path) => {
        fetched.push(digest)
        await held
        writeFileSync(path, store.get(digest) ?? '')
      },
    },
  })
  let isWaiting = () => {}
  const waiting = new Promise<void>((resolve) => {
    isWaiting = resolve
  })
  const first = slow.find(place(file), find)
  const second = cacheOf().find(place(file), { ...find, onMoved: () => isWaiting() })
  await waiting
  release()
  assert.equal(await first, await second)
  assert.equal(fetched.length, 1)
})

test('the models used longest ago go first when the cache is full', async () => {
  const cache = cacheOf({ maxBytes: 25 })
  const found: string[] = []
  for (const [index, letter] of ['a', 'b'].entries()) {
    const path = await cache.find(place(told('model.safetensors', letter.repeat(10))), find)
    found.push(path)
    utimesSync(join(path, '.used'), 1_000 + index, 1_000 + index)
  }
  found.push(await cache.find(place(told('model.safetensors', 'c'.repeat(10))), find))
  assert.deepEqual(
    found.map((path) => existsSync(path)),
    [false, true, true],
  )
})

test('a model that the cache can not hold is refused with the sizes', async () => {
  const file = told('model.safetensors', 'x'.repeat(3 << 20))
  await assert.rejects(cacheOf({ maxBytes: 1 << 20 }).find(place(file), find), {
    code: 'DISK_FULL',
    message: /need 3\.0 MiB .* may hold 1\.0 MiB/,
  })
})
