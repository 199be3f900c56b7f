/** What a job needs to know of its base model: shape, digest, and that its files are there. */
import { createHash } from 'node:crypto'
import { createReadStream, existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'
import { TunemeshError } from '../proto/errors.js'
import { readGguf } from '../proto/gguf-metadata.js'
import {
  type ModelConfig,
  modelConfigFromGguf,
  modelConfigFromJson,
} from '../proto/model-config.js'

export interface BaseModel {
  /** Absolute: a folder or a .gguf file. */
  path: string
  config: ModelConfig
  /** The files that make up weights and shape, by absolute path. */
  files: string[]
}

/**
 * @param shown the path as the user gave it, for messages
 * @throws TunemeshError MODEL_NOT_FOUND, MODEL_INVALID, MODEL_UNSUPPORTED or GGUF_INVALID
 */
export function readBaseModel(path: string, shown: string): BaseModel {
  if (!existsSync(path)) {
    throw new TunemeshError(
      'MODEL_NOT_FOUND',
      `model: ${shown} does not exist (looked at ${path}). Give a Hugging Face folder or a ` +
        `.gguf file.`,
    )
  }
  if (statSync(path).isFile()) {
    if (!path.endsWith('.gguf')) {
      throw new TunemeshError(
        'MODEL_INVALID',
        `model: ${shown} is a file, but not a .gguf file. Give the folder that config.json ` +
          `lies in.`,
      )
    }
    return { path, config: modelConfigFromGguf(readGguf(path), shown), files: [path] }
  }
  const configPath = join(path, 'config.json')
  if (!existsSync(configPath)) {
    throw new TunemeshError(
      'MODEL_NOT_FOUND',
      `model: ${shown} has no config.json${ggufHint(path)}. Give a Hugging Face folder or a ` +
        `.gguf file.`,
    )
  }
  const config = modelConfigFromJson(readJson(configPath), `${shown}/config.json`)
  return { path, config, files: [configPath, ...weightFiles(path, shown)] }
}

/**
 * "sha256:<hex>" over the names and SHA-256 of the model's files, read once.
 * Digests of files that have not changed since are remembered.
 */
export async function digestOf(model: BaseModel): Promise<string> {
  const whole = createHash('sha256')
  for (const path of [...model.files].sort()) {
    whole.update(`${basename(path)} ${await fileDigest(path)}\n`)
  }
  return `sha256:${whole.digest('hex')}`
}

/** Bounded: a coordinator meets few models, and a forgotten digest is only computed again. */
const maxRemembered = 1000
const remembered = new Map<string, string>()

async function fileDigest(path: string): Promise<string> {
  const { size, mtimeMs, ino } = statSync(path)
  const key = `${path} ${size} ${mtimeMs} ${ino}`
  const known = remembered.get(key)
  if (known !== undefined) return known
  const hash = createHash('sha256')
  for await (const piece of createReadStream(path, { highWaterMark: 1 << 20 })) hash.update(piece)
  const digest = hash.digest('hex')
  if (remembered.size >= maxRemembered) remembered.clear()
  remembered.set(key, digest)
  return digest
}

function ggufHint(path: string): string {
  const gguf = readdirSync(path).find((name) => name.endsWith('.gguf'))
  return gguf === undefined ? '' : ` (but ${gguf}: name that file)`
}

function readJson(path: string): unknown {
  try {
    return JSON.parse(readFileSync(path, 'utf8'))
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause)
    throw new TunemeshError('MODEL_INVALID', `${path} is not JSON: ${reason}`, { cause })
  }
}

/** model.safetensors, or all the files that model.safetensors.index.json names. */
function weightFiles(path: string, shown: string): string[] {
  const indexPath = join(path, 'model.safetensors.index.json')
  const single = join(path, 'model.safetensors')
  if (!existsSync(indexPath)) {
    if (existsSync(single)) return [single]
    const others = readdirSync(path).filter((name) => /\.(bin|pt|pth)$/.test(name))
    const hint = others.length === 0 ? '' : ` It has ${others[0]}: save the model as safetensors.`
    throw new TunemeshError('MODEL_NOT_FOUND', `model: ${shown} has no model.safetensors.${hint}`)
  }
  const index = readJson(indexPath) as { weight_map?: Record<string, unknown> } | null
  const names = [...new Set(Object.values(index?.weight_map ?? {}).map(String))]
  const bad = names.find((name) => name !== basename(name) || !existsSync(join(path, name)))
  if (names.length === 0 || bad !== undefined) {
    throw new TunemeshError(
      'MODEL_INVALID',
      bad === undefined
        ? `model: ${shown}/model.safetensors.index.json names no files.`
        : `model: ${shown}/model.safetensors.index.json names ${bad}, which is not there. ` +
            `Download it.`,
    )
  }
  return [indexPath, ...names.map((name) => join(path, name))]
}
