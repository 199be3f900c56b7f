/** What a job needs to know of its base model: shape, and that its files are there. */
import { existsSync, readdirSync, readFileSync, statSync } from 'node:fs'
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
