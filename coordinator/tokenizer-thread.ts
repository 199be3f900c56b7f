/** Entry of a tokenising thread: renders and tokenises what tokenizer-pool.ts sends it. */
import { parentPort, workerData } from 'node:worker_threads'
import { TunemeshError } from '../proto/errors.js'
import { type ChatMessage, ChatTemplate } from './chat-template.js'
import { namedId, type RowReader, type TokenizedRow, tokenizeRow } from './loss-mask.js'
import type { TokenizerInfo } from './prepared-job.js'
import type { Row } from './rows.js'
import { loadTokenizer, type TokenizerLibrary } from './tokenizer.js'

export interface ThreadData {
  modelPath: string
  library?: TokenizerLibrary
}

/** One row's tokens, or why it has none. */
export type RowResult = TokenizedRow | { problem: string }

/** What a thread can do, as seen by the pool: each a message with its arguments. */
export interface ThreadMethods {
  describe(): Promise<TokenizerInfo>
  tokenizeRows(rows: Row[]): Promise<RowResult[]>
  /** Rendered with the generation prompt. */
  chatPrompt(messages: ChatMessage[]): Promise<{ text: string; ids: number[] }>
  encode(text: string, addSpecialTokens: boolean): Promise<number[]>
  decode(ids: number[]): Promise<string>
  /** Without special tokens. */
  decodeAnswer(ids: number[]): Promise<string>
}

export interface ThreadRequest {
  id: number
  method: keyof ThreadMethods
  args: unknown[]
}

export type ThreadReply =
  | { id: number; value: unknown }
  | { id: number; error: { code: string; message: string; details: string[] } }

const { modelPath, library } = workerData as ThreadData
let loading: Promise<RowReader> | undefined

function reader(): Promise<RowReader> {
  loading ??= loadTokenizer(modelPath, library).then((tokenizer) => ({
    tokenizer,
    template: ChatTemplate.of(tokenizer.files),
  }))
  return loading
}

const methods: ThreadMethods = {
  async describe() {
    const { tokenizer } = await reader()
    const eosId = namedId(tokenizer, 'eos_token')
    const stopIds = [...tokenizer.files.configuredStopIds, ...(eosId === null ? [] : [eosId])]
    return {
      stopIds: [...new Set(stopIds)],
      bosId: namedId(tokenizer, 'bos_token'),
      eosId,
      padId: namedId(tokenizer, 'pad_token'),
      chatTemplate: tokenizer.files.chatTemplate,
      vocabSize: tokenizer.vocabSize,
    }
  },
  async tokenizeRows(rows) {
    const rowReader = await reader()
    const results: RowResult[] = []
    for (const row of rows) results.push(await tokenizeOne(row, rowReader))
    return results
  },
  async chatPrompt(messages) {
    const { tokenizer, template } = await reader()
    if (!template) {
      const message = 'The model has no chat template. Give a prompt instead of messages.'
      throw new TunemeshError('CHAT_TEMPLATE_INVALID', message)
    }
    const text = template.render(messages, true)
    return { text, ids: await tokenizer.encode(text, false) }
  },
  async encode(text, addSpecialTokens) {
    return (await reader()).tokenizer.encode(text, addSpecialTokens)
  },
  async decode(ids) {
    return (await reader()).tokenizer.decode(ids)
  },
  async decodeAnswer(ids) {
    const { tokenizer } = await reader()
    return tokenizer.decode(ids.filter((id) => !tokenizer.specialIds.has(id)))
  },
}

/** A row that cannot be rendered is that row's problem, named with its line. */
async function tokenizeOne(row: Row, rowReader: RowReader): Promise<RowResult> {
  try {
    return await tokenizeRow(row, rowReader)
  } catch (error) {
    if (!(error instanceof TunemeshError)) throw error
    return { problem: error.message }
  }
}

parentPort?.on('message', (request: ThreadRequest) => {
  void answer(request).then((reply) => parentPort?.postMessage(reply))
})

async function answer({ id, method, args }: ThreadRequest): Promise<ThreadReply> {
  try {
    const call = methods[method] as (...args: unknown[]) => Promise<unknown>
    return { id, value: await call(...args) }
  } catch (error) {
    const isOurs = error instanceof TunemeshError
    const code = isOurs ? error.code : 'INTERNAL'
    const message = error instanceof Error ? error.message : String(error)
    return { id, error: { code, message, details: isOurs ? error.details : [] } }
  }
}
