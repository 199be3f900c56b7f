/** `tunemesh chat [JOB]`: talk to a tuned model, or to any base model or adapter. */

import { resolve } from 'node:path'
import { createInterface, type Interface } from 'node:readline/promises'
import type { TunemeshClient } from '../client/client.js'
import type { ChatMessage } from '../proto/gen/tunemesh/v1/ChatMessage.js'
import type { GenerateRequest } from '../proto/gen/tunemesh/v1/GenerateRequest.js'
import { newestJob } from './chosen-job.js'
import type { Context } from './context.js'
import { escapeText } from './escape.js'
import { type Mesh, withMesh } from './mesh.js'

export interface ChatOptions {
  model?: string | undefined
  adapter?: string | undefined
  prompt?: string | undefined
  system?: string | undefined
  maxNewTokens: number
  temperature: number
  topP: number
  seed: number
  threads?: number | undefined
  device?: string | undefined
}

type Settings = Omit<GenerateRequest, 'messages'>

export async function chat(
  context: Context,
  jobId: string | undefined,
  options: ChatOptions,
): Promise<void> {
  const { threads = 0, device } = options
  const needs = { numWorkers: 1, threadsPerWorker: threads, device, isHeld: true }
  await withMesh(context, needs, async (mesh) => {
    const settings = await settingsFor(mesh.client, jobId, options)
    const messages = options.system ? [{ role: 'system', content: options.system }] : []
    if (options.prompt !== undefined) {
      messages.push({ role: 'user', content: options.prompt })
      await answer(context, mesh, { settings, messages })
    } else await converse(context, mesh, { settings, messages })
  })
}

async function settingsFor(
  client: TunemeshClient,
  jobId: string | undefined,
  options: ChatOptions,
): Promise<Settings> {
  const isNamed = jobId !== undefined || options.model !== undefined
  const job = isNamed ? undefined : await newestJob(client, (it) => it.state === 'SUCCEEDED')
  return {
    jobId: jobId ?? job?.jobId ?? '',
    model: options.model === undefined ? '' : resolve(options.model),
    adapterDir: options.adapter === undefined ? '' : resolve(options.adapter),
    maxNewTokens: options.maxNewTokens,
    temperature: options.temperature,
    topP: options.topP,
    seed: options.seed,
  }
}

interface Turn {
  settings: Settings
  messages: ChatMessage[]
}

/** Streams one answer; an interrupt ends the answer, not the program. Returns its text. */
async function answer(context: Context, mesh: Mesh, turn: Turn): Promise<string> {
  const { output } = context
  const cancel = new AbortController()
  const restore = context.interrupts.handle(() => cancel.abort())
  const request = { ...turn.settings, messages: turn.messages }
  let text = ''
  let tokenIds: number[] = []
  let finishReason = ''
  try {
    const signal = AbortSignal.any([cancel.signal, mesh.signal])
    for await (const piece of mesh.client.generate(request, signal)) {
      text += piece.text
      tokenIds = tokenIds.concat(piece.tokenIds)
      if (piece.done) finishReason = piece.finishReason
      output.text(escapeText(piece.text))
    }
  } catch (error) {
    if (!cancel.signal.aborted) throw error
    finishReason = 'interrupted'
  } finally {
    restore()
  }
  output.line()
  output.record('answer', { text, tokenIds, finishReason })
  return text
}

async function converse(context: Context, mesh: Mesh, turn: Turn): Promise<void> {
  const { output } = context
  const { jobId, model, adapterDir } = turn.settings
  output.note(`Talking to ${adapterDir || jobId || model}. /new starts over, /exit or Ctrl-D ends.`)
  const system = [...turn.messages]
  const lines = createInterface({ input: process.stdin, output: output.stderr })
  try {
    for (;;) {
      const line = await ask(context, lines)
      if (line === null || line === '/exit') return
      if (line === '/new') turn.messages = [...system]
      else if (line !== '') {
        turn.messages.push({ role: 'user', content: line })
        turn.messages.push({ role: 'assistant', content: await answer(context, mesh, turn) })
      }
    }
  } finally {
    lines.close()
  }
}

/** One line from the person; null at the end of the input or at Ctrl-C. */
async function ask(context: Context, lines: Interface): Promise<string | null> {
  const leave = new AbortController()
  const end = () => leave.abort()
  const restore = context.interrupts.handle(end)
  lines.once('close', end)
  lines.once('SIGINT', end)
  try {
    const prompt = context.output.isTerminal ? '› ' : ''
    return (await lines.question(prompt, { signal: leave.signal })).trim()
  } catch (error) {
    if (leave.signal.aborted) return null
    throw error
  } finally {
    restore()
    lines.off('close', end)
    lines.off('SIGINT', end)
  }
}
