import assert from 'node:assert/strict'
import { existsSync, renameSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { after, before, describe, test } from 'node:test'
import { CliProcess, jsonLines } from './cli-process.js'
import { examplesDir, TestCoordinator, tinyJob } from './open-coordinator.js'
import { engineMissing, type TemporaryFolder, temporaryFolder } from './temporary-mesh.js'

const model = join(examplesDir, 'tiny-llama')
const answers = [
  ['What is a wren?', 'a very small brown bird'],
  ['What is an anvil?', 'a block of iron for a smith'],
  ['What is a brook?', 'a little stream of water'],
] as const

const rows = answers.map(([question, answer]) =>
  JSON.stringify({
    messages: [
      { role: 'user', content: question },
      { role: 'assistant', content: answer },
    ],
  }),
)

/** Enough passes over three rows for the tiny random model to know them by heart. */
const byHeart = {
  data: 'rows.jsonl',
  max_steps: 100,
  gradient_accumulation_steps: 1,
  learning_rate: 0.005,
  lr_scheduler_type: 'cosine',
}

describe('chat with a tuned model', { skip: engineMissing(), timeout: 180_000 }, () => {
  for (const finetuning of ['lora', 'full']) {
    describe(finetuning, () => {
      let folder: TemporaryFolder
      let jobId = ''

      const start = (...args: string[]) =>
        // Named relatively, as a user would: nothing may depend on where a process stands.
        new CliProcess(['--state-dir', relative(process.cwd(), folder.stateDir), ...args])
      const run = (...args: string[]) => start(...args).ended

      async function answerOf(question: string, ...args: string[]): Promise<string> {
        const done = await run('chat', ...args, '--prompt', question, '--json')
        assert.equal(done.code, 0, done.stderr + done.stdout)
        const answer = jsonLines(done.stdout).at(-1) as unknown as { type: string; text: string }
        assert.equal(answer.type, 'answer')
        return answer.text
      }

      before(async () => {
        folder = temporaryFolder({ ...byHeart, finetuning })
        writeFileSync(join(folder.stateDir, '..', 'rows.jsonl'), `${rows.join('\n')}\n`)
        const done = await run('train', folder.jobPath, '--json')
        assert.equal(done.code, 0, done.stderr + done.stdout)
        const result = jsonLines(done.stdout).find((line) => line.type === 'result')
        jobId = (result?.job as { jobId: string } | undefined)?.jobId ?? ''
      })
      after(() => folder.remove())

      test('after train has ended, the job answers with what it was taught', async () => {
        const [question, answer] = answers[0]
        assert.equal(await answerOf(question, jobId), answer)
      })

      test('the delivered folder answers alike, and the job also when it was moved', async () => {
        // A mesh that stays: each question would start one of its own, which takes the most time.
        const up = start('up', '--workers', '1', '--grpc-port', '0', '--no-dashboard', '--json')
        await up.until(/"type":"mesh"/)
        const [question, answer] = answers[1]
        assert.notEqual(await answerOf(question, '--model', model), answer)
        const moved = `${folder.outputDir}-moved`
        renameSync(folder.outputDir, moved)
        const files =
          finetuning === 'full'
            ? ['config.json', 'tokenizer.json', 'tokenizer_config.json', 'model.safetensors']
            : ['adapter_config.json', 'adapter_model.safetensors']
        assert.deepEqual(
          files.filter((name) => !existsSync(join(moved, name))),
          [],
        )
        const named =
          finetuning === 'full' ? ['--model', moved] : ['--model', model, '--adapter', moved]
        assert.equal(await answerOf(question, ...named), answer)
        assert.equal(await answerOf(question, jobId), answer)
        up.interrupt()
        assert.equal((await up.ended).code, 0)
      })
    })
  }

  test('without a worker the answer is an error, soon', async () => {
    const coordinator = await TestCoordinator.open()
    const asked = coordinator.client.generate({ model, prompt: 'What?' })
    await assert.rejects(asked.next(), { code: 'NO_WORKERS', message: /tunemesh worker/ })
    await coordinator.close()
    coordinator.removeState()
  })

  test('while all workers train the answer names the job; a job ends a chat', async () => {
    const coordinator = await TestCoordinator.open({ workers: 1 })
    const { client } = coordinator
    const question = { model, prompt: 'What?', maxNewTokens: 4_096 }
    const chat = client.generate(question)
    await chat.next()
    const outputs = temporaryFolder({})
    const job = await client.submit(tinyJob(outputs.outputDir))
    for await (const event of client.watch(job.jobId)) {
      if (event.step?.step !== 2) continue
      const asked = client.generate(question).next()
      await assert.rejects(asked, { code: 'STATE_CONFLICT', message: new RegExp(job.jobId) })
    }
    const ended = await client.get(job.jobId)
    assert.deepEqual([ended.state, ended.error], ['SUCCEEDED', null])
    assert.equal((await client.generate({ ...question, maxNewTokens: 1 }).next()).done, false)
    await coordinator.close()
    coordinator.removeState()
    outputs.remove()
  })

  test('a job, a model or an adapter that is not there is named', async () => {
    const coordinator = await TestCoordinator.open({ workers: 1 })
    const { client } = coordinator
    const ask = (request: object) => client.generate({ prompt: 'What?', ...request }).next()
    await assert.rejects(ask({ jobId: 'job-none' }), { code: 'JOB_NOT_FOUND', message: /job-none/ })
    const missing = join(examplesDir, 'nowhere')
    await assert.rejects(ask({ model: missing }), { code: 'MODEL_NOT_FOUND', message: /nowhere/ })
    const adapter = ask({ model, adapterDir: missing })
    await assert.rejects(adapter, { code: 'MODEL_NOT_FOUND', message: /nowhere/ })
    await coordinator.close()
    coordinator.removeState()
  })
})
