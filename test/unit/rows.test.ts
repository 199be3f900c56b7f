import assert from 'node:assert/strict'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, describe, it } from 'node:test'
import { type ReadRow, readRows } from '../../coordinator/rows.js'
import { TunemeshError } from '../../proto/errors.js'
import type { JobSpec } from '../../proto/job-spec.js'

const folder = mkdtempSync(join(tmpdir(), 'tunemesh-rows-'))
after(() => rmSync(folder, { recursive: true, force: true }))
const path = join(folder, 'rows.jsonl')

async function read(
  content: string | Buffer,
  kind: JobSpec['kind'] = 'auto',
  maxBytes?: number,
): Promise<ReadRow[]> {
  writeFileSync(path, content)
  const rows: ReadRow[] = []
  for await (const row of readRows(path, kind, maxBytes)) rows.push(row)
  return rows
}

/** The only row's problem. */
async function problemOf(row: unknown, kind: JobSpec['kind'] = 'auto'): Promise<string> {
  const [first] = await read(`${JSON.stringify(row)}\n`, kind)
  return first && 'problem' in first ? first.problem : JSON.stringify(first)
}

const turn = (role: string, content: unknown) => ({ role, content })

describe('rows', () => {
  it('reads each kind, and question with answer as two turns', async () => {
    const messages = [turn('user', 'a'), turn('assistant', 'b')]
    assert.deepEqual(await read(JSON.stringify({ messages, id: 7 })), [
      { kind: 'messages', messages, line: 1 },
    ])
    assert.deepEqual(await read('{"question":"a","answer":"b"}'), [
      { kind: 'messages', messages, line: 1 },
    ])
    assert.deepEqual(await read('{"prompt":"","completion":"b"}'), [
      { kind: 'prompt_completion', prompt: '', completion: 'b', line: 1 },
    ])
    assert.deepEqual(await read('{"text":"a"}'), [{ kind: 'text', text: 'a', line: 1 }])
  })

  it('takes a byte order mark, CRLF, empty lines and a last line without an end', async () => {
    assert.deepEqual(await read('\uFEFF{"text":"a"}\r\n\r\n  \n{"text":"b"}'), [
      { kind: 'text', text: 'a', line: 1 },
      { kind: 'text', text: 'b', line: 4 },
    ])
    assert.deepEqual(await read(''), [])
  })

  it('names broken lines and reads on after them', async () => {
    const bytes = Buffer.concat([
      Buffer.from('{"text":"a"}\n{"text":\n[1]\n'),
      Buffer.from([0x7b, 0xff, 0x7d, 0x0a]),
      Buffer.from('{"text":"e"}\n'),
    ])
    const rows = await read(bytes)
    assert.deepEqual(rows[0], { kind: 'text', text: 'a', line: 1 })
    assert.match((rows[1] as { problem: string }).problem, /^is not JSON: /)
    assert.deepEqual(rows.slice(2), [
      {
        line: 3,
        problem:
          'is not a JSON object. A row is {"messages": ...}, {"prompt": ...} or {"text": ...}.',
      },
      { line: 4, problem: 'has bytes that are not UTF-8. Save the file as UTF-8.' },
      { kind: 'text', text: 'e', line: 5 },
    ])
  })

  it('refuses a line beyond the limit once, takes one at the limit', async () => {
    const fits = '{"text":"abc"}'
    const rows = await read(`${fits}\n${fits}x\n${fits}\n`, 'auto', fits.length)
    assert.deepEqual(rows, [
      { kind: 'text', text: 'abc', line: 1 },
      {
        line: 2,
        problem: 'has more than 14 bytes in one line. Put each row on its own.',
      },
      { kind: 'text', text: 'abc', line: 3 },
    ])
  })

  it('reads a line that spans many reads of the file', async () => {
    const text = 'é'.repeat(200_000)
    assert.deepEqual(await read(`${JSON.stringify({ text })}\n{"text":"b"}\n`), [
      { kind: 'text', text, line: 1 },
      { kind: 'text', text: 'b', line: 2 },
    ])
  })

  it('lets the first row settle the kind, and refuses another kind after it', async () => {
    assert.deepEqual(await read('{"text":"a"}\n{"prompt":"a","completion":"b"}\n'), [
      { kind: 'text', text: 'a', line: 1 },
      {
        line: 2,
        problem: "is of kind prompt_completion, but the job's rows are of kind text.",
      },
    ])
  })

  it('refuses a row that fits two kinds unless the job says which', async () => {
    const row = { text: 'a', prompt: 'a', completion: 'b' }
    assert.equal(
      await problemOf(row),
      'fits two kinds, prompt/completion and text. Set kind, or leave one of them out.',
    )
    assert.equal(await problemOf(row, 'text'), '{"kind":"text","text":"a","line":1}')
  })

  it('says what a row lacks', async () => {
    const cases: [unknown, string][] = [
      [{}, 'has no keys; a row has messages, prompt and completion, or text.'],
      [
        { mesages: [], id: 1 },
        'has the keys mesages, id; a row has messages, prompt and completion, or text.',
      ],
      [{ text: '' }, 'has an empty text.'],
      [{ text: 3 }, 'has text of type number, expected text.'],
      [{ prompt: null, completion: 'b' }, 'has prompt of type null, expected text.'],
      [{ prompt: 'a', completion: '' }, 'is all prompt: its completion is empty.'],
      [{ messages: [] }, 'has messages that are not a list of at least one message.'],
      [{ messages: 'hi' }, 'has messages that are not a list of at least one message.'],
      [{ messages: [null] }, 'has message 1 that is no object.'],
      [
        { messages: [turn('human', 'a')] },
        'has message 1 with role "human"; a role is one of system, user, assistant, tool.',
      ],
      [
        { messages: [turn('user', 'a'), turn('assistant', [{ text: 'b' }])] },
        'has message 2 with content of type list, expected text.',
      ],
      [
        { messages: [turn('user', 'a')] },
        'is all prompt: no message of role assistant says anything.',
      ],
      [
        { messages: [turn('user', 'a'), turn('assistant', '')] },
        'is all prompt: no message of role assistant says anything.',
      ],
    ]
    for (const [row, problem] of cases) assert.equal(await problemOf(row), problem)
  })

  it('names a file that is missing or a folder', async () => {
    const refusal = async (place: string) => {
      try {
        for await (const _ of readRows(place, 'auto')) assert.fail('a row')
      } catch (error) {
        assert.ok(error instanceof TunemeshError)
        return `${error.code} ${error.message}`
      }
      return 'no refusal'
    }
    assert.equal(
      await refusal(join(folder, 'none.jsonl')),
      `DATA_INVALID ${join(folder, 'none.jsonl')}: there is no such file.`,
    )
    assert.equal(
      await refusal(folder),
      `DATA_INVALID ${folder}: it is a folder; give a .jsonl file.`,
    )
  })
})
