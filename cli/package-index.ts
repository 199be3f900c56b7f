/** Finds and fetches a pinned wheel from a package index (its "simple" pages, HTML or JSON). */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { type FileHandle, open, rm, stat } from 'node:fs/promises'
import { backoffMs, type RetryPolicy, realSurroundings } from '../client/retry.js'
import { TunemeshError } from '../proto/errors.js'
import type { Wheel } from './library-wheels.js'

export interface Download {
  /** Of the index: the folder that has one page a package. */
  index: URL
  wheel: Wheel
  /** What is there already is kept, and the rest is asked for. */
  path: string
  onProgress(haveBytes: number): void
  signal: AbortSignal
}

/** An attempt counts as failed where it brings nothing new. */
const retry: RetryPolicy = { maxAttempts: 5, firstDelayMs: 200, maxDelayMs: 5_000 }
const stallMs = 60_000
const maxPageBytes = 16 << 20
const pageTypes = 'application/vnd.pypi.simple.v1+json, text/html;q=0.5'

/** @throws LIBRARIES_NOT_FETCHED, or WHEEL_CORRUPT where the SHA-256 is not the pinned one */
export async function downloadWheel(download: Download): Promise<void> {
  const { wheel, path, signal } = download
  const url = await findWheel(download)
  let failures = 0
  for (;;) {
    const before = await bytesOf(path)
    if (before === wheel.sizeBytes) break
    try {
      await fetchRest(download, url, before)
      failures = 0
    } catch (error) {
      signal.throwIfAborted()
      if (error instanceof TunemeshError) throw error
      failures = (await bytesOf(path)) > before ? 1 : failures + 1
      if (failures >= retry.maxAttempts) throw unreachable(url, error)
      await realSurroundings.wait(backoffMs(retry, failures, Math.random()), signal)
    }
  }
  await checkWheel(wheel, path)
}

/** A wrong file is removed: it would be found again by the next run. */
export async function checkWheel(wheel: Wheel, path: string): Promise<void> {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(chunk)
  const found = hash.digest('hex')
  if (found === wheel.sha256) return
  await rm(path, { force: true })
  throw new TunemeshError(
    'WHEEL_CORRUPT',
    `${wheel.file} has the SHA-256 ${found}, expected ${wheel.sha256}. The file was removed: ` +
      'run it again, and if it repeats, give another index with --index.',
  )
}

async function findWheel({ index, wheel, signal }: Download): Promise<URL> {
  const folder = index.href.endsWith('/') ? index : new URL(`${index.pathname}/`, index)
  const page = new URL(`${wheel.name}/`, folder)
  page.username = index.username
  page.password = index.password
  const response = await request(page, { accept: pageTypes }, signal).catch((error: unknown) => {
    signal.throwIfAborted()
    throw unreachable(page, error)
  })
  if (!response.ok) throw unreachable(page, new Error(`it answers ${response.status}`))
  const text = await pageText(response, page)
  const isJson = response.headers.get('content-type')?.includes('json') ?? false
  const link = isJson ? linkOfJson(text, wheel) : linkOfHtml(text, wheel)
  if (link === null) {
    throw new TunemeshError(
      'LIBRARIES_NOT_FETCHED',
      `${shown(page)} does not list ${wheel.file}. Give an index that has ${wheel.name} ` +
        `${wheel.version} with --index URL.`,
    )
  }
  // Relative links count from where the page was after redirections.
  const found = new URL(link, response.url)
  found.hash = ''
  if (found.host === index.host) {
    found.username = index.username
    found.password = index.password
  }
  return found
}

async function pageText(response: Response, page: URL): Promise<string> {
  const parts: Uint8Array[] = []
  let bytes = 0
  for await (const part of response.body ?? []) {
    bytes += part.length
    if (bytes > maxPageBytes) throw unreachable(page, new Error('its page has no end'))
    parts.push(part)
  }
  return Buffer.concat(parts).toString('utf8')
}

function linkOfJson(text: string, wheel: Wheel): string | null {
  try {
    const { files = [] } = JSON.parse(text) as { files?: { filename: string; url: string }[] }
    return files.find(({ filename }) => filename === wheel.file)?.url ?? null
  } catch {
    return null // no page of an index
  }
}

function linkOfHtml(text: string, wheel: Wheel): string | null {
  for (const [, link = ''] of text.matchAll(/<a\s[^>]*?href\s*=\s*["']([^"']+)["']/gi)) {
    const plain = link.replaceAll('&amp;', '&')
    const path = decodeURIComponent(plain.split(/[?#]/)[0] ?? '')
    if (path.split('/').at(-1) === wheel.file) return plain
  }
  return null
}

async function fetchRest(download: Download, url: URL, have: number): Promise<void> {
  const { wheel, path, signal } = download
  const stall = new AbortController()
  const rest = AbortSignal.any([signal, stall.signal])
  const wanted = have > wheel.sizeBytes ? 0 : have
  const response = await request(url, wanted > 0 ? { range: `bytes=${wanted}-` } : {}, rest)
  if (!response.ok) {
    await response.body?.cancel()
    if (response.status < 500) throw unreachable(url, new Error(`it answers ${response.status}`))
    throw new Error(`it answers ${response.status}`)
  }
  // A server that knows no ranges sends the whole file.
  const start = startOf(response, wanted)
  const file = await open(path, start === 0 ? 'w' : 'r+')
  try {
    await write(file, response, { start, wheel, stall, onProgress: download.onProgress })
  } finally {
    await file.close()
  }
}

function startOf(response: Response, wanted: number): number {
  if (response.status !== 206) return 0
  const told = /^bytes (\d+)-/.exec(response.headers.get('content-range') ?? '')?.[1]
  if (Number(told) === wanted) return wanted
  throw new Error(`it was asked for bytes from ${wanted} on, and sends from ${told}`)
}

interface Writing {
  start: number
  wheel: Wheel
  stall: AbortController
  onProgress(haveBytes: number): void
}

async function write(file: FileHandle, response: Response, writing: Writing): Promise<void> {
  const { wheel, stall, onProgress } = writing
  let at = writing.start
  let timer: NodeJS.Timeout | undefined
  const expect = () => {
    clearTimeout(timer)
    timer = setTimeout(() => stall.abort(new Error(`no byte for ${stallMs / 1e3} s`)), stallMs)
  }
  try {
    expect()
    for await (const part of response.body ?? []) {
      if (at + part.length > wheel.sizeBytes) throw tooLong(wheel)
      await file.write(part, 0, part.length, at)
      at += part.length
      onProgress(at)
      expect()
    }
  } finally {
    clearTimeout(timer)
  }
}

/** The user's name and password in an index's URL travel as a header, which fetch asks for. */
function request(url: URL, headers: Record<string, string>, signal: AbortSignal) {
  const bare = new URL(url)
  bare.username = ''
  bare.password = ''
  const { username, password } = url
  const user = `${decodeURIComponent(username)}:${decodeURIComponent(password)}`
  const authorization = `Basic ${Buffer.from(user).toString('base64')}`
  const all = username === '' ? headers : { ...headers, authorization }
  return fetch(bare, { headers: all, signal })
}

export async function bytesOf(path: string): Promise<number> {
  return (await stat(path).catch(() => null))?.size ?? 0
}

const tooLong = (wheel: Wheel) =>
  new TunemeshError(
    'WHEEL_CORRUPT',
    `${wheel.file} is longer than the pinned ${wheel.sizeBytes} bytes. Give another index ` +
      'with --index.',
  )

/** Without the user's name and password. */
export function shown(url: URL): string {
  return url.origin + url.pathname
}

function unreachable(url: URL, error: unknown): TunemeshError {
  const { message, cause } = error as Error
  const why = cause instanceof Error ? `${message}: ${cause.message}` : message
  return new TunemeshError(
    'LIBRARIES_NOT_FETCHED',
    `${shown(url)} can not be read: ${why}. Check the network and --index, then run it again: ` +
      'what was fetched is kept.',
    { cause: error },
  )
}
