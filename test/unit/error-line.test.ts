import assert from 'node:assert/strict'
import { once } from 'node:events'
import { PassThrough } from 'node:stream'
import { test } from 'node:test'
import { errorLine, lastErrorIn, OutputTail } from '../../proto/error-line.js'
import { TunemeshError } from '../../proto/errors.js'

test('error line: the last one counts, whatever else was written', () => {
  const first = errorLine(new TunemeshError('WORKER_FAILED', 'early'))
  const last = errorLine(new TunemeshError('ENGINE_MISSING', 'no "engine"\n', { details: ['a'] }))
  const told = lastErrorIn(`loading…\n${first}{"error":7}\n${last}bye\n{"error":`)
  assert.deepEqual(
    { code: told?.code, message: told?.message, details: told?.details },
    { code: 'ENGINE_MISSING', message: 'no "engine"\n', details: ['a'] },
  )
})

test('error line: what is not expected is ours, and no line is no error', () => {
  assert.equal(lastErrorIn(errorLine(new RangeError('x')))?.code, 'INTERNAL')
  assert.equal(lastErrorIn('all well\n'), null)
  assert.equal(lastErrorIn('{"error":{"code":"NO_SUCH","message":"x"}}'), null)
})

test('output tail: of a child that writes without end the last part is kept', async () => {
  const stream = new PassThrough()
  const tail = new OutputTail(stream)
  for (let i = 0; i < 20; i++) stream.write('x'.repeat(10_000))
  stream.end(`\n${errorLine(new TunemeshError('ENGINE_MISSING', 'gone'))}`)
  await once(stream, 'end')
  assert.ok(tail.text.length <= 1 << 16)
  assert.equal(lastErrorIn(tail.text)?.code, 'ENGINE_MISSING')
})
