import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import {
  buildRows,
  type Entry,
  medicineEntries,
  type Row,
} from '../../examples/drug-names/build-rows.js'

const entries = medicineEntries()
const answerOf = (row: Row) => row.messages[1]?.content ?? ''
const questionOf = (row: Row) => row.messages[0]?.content ?? ''
const entryOf = new Map<string, Entry>(entries.map((entry) => [entry.gloss, entry]))

describe('drug names', () => {
  const sets = buildRows(entries, 1)

  it('has 64 rows to train, 24 rephrased and 24 never seen, metformin first', () => {
    assert.deepEqual(
      [sets.train, sets.trainShuffled, sets.seenRephrased, sets.neverSeen].map(
        (rows) => rows.length,
      ),
      [64, 64, 24, 24],
    )
    assert.deepEqual(sets.train[0], {
      messages: [
        { role: 'user', content: 'What is metformin?' },
        {
          role: 'assistant',
          content:
            'an antidiabetic drug (trade name Glucophage) prescribed to treat type II diabetes',
        },
      ],
    })
  })

  it('is the same for the same seed, and does not depend on the order of the dictionary', () => {
    assert.deepEqual(buildRows([...entries].reverse(), 1), sets)
    assert.notDeepEqual(buildRows(entries, 2), sets)
  })

  it('rephrases only trained entries, and never-seen ones share no synset with them', () => {
    const synset = (row: Row) => entryOf.get(answerOf(row))?.offset
    const trained = new Set(sets.train.map(synset))
    assert.equal(trained.size, 64)
    assert.ok(sets.seenRephrased.every((row) => trained.has(synset(row))))
    assert.ok(sets.neverSeen.every((row) => !trained.has(synset(row))))
    const questions = new Set(sets.train.map(questionOf))
    assert.ok(sets.seenRephrased.every((row) => !questions.has(questionOf(row))))
  })

  it('gives the control the same questions and answers, no question its own answer', () => {
    const right = new Map(sets.train.map((row) => [questionOf(row), answerOf(row)]))
    for (const row of sets.trainShuffled) {
      assert.notEqual(answerOf(row), right.get(questionOf(row)))
    }
    const sorted = (rows: Row[]) => rows.map(answerOf).sort()
    assert.deepEqual(sorted(sets.trainShuffled), sorted(sets.train))
  })
})
