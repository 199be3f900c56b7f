/** `tunemesh up --listen` and workers that join it as those of another host do. */
import assert from 'node:assert/strict'
import { cpSync, mkdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { connect, type JobEvent, type TunemeshClient } from '../../client/client.js'
import { liveEndpoint } from '../../client/endpoint.js'
import { CliProcess, jsonLines } from './cli-process.js'
import { examplesDir, tinyJob } from './open-coordinator.js'
import { temporaryFolder } from './open-nats.js'

const modelFiles = ['config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json']

interface JoinLine {
  url: string
  token: string
}

export class RemoteMesh {
  readonly #workers: CliProcess[] = []
  #numJobs = 0

  private constructor(
    readonly folder: string,
    readonly up: CliProcess,
    readonly client: TunemeshClient,
    readonly joinLine: JoinLine,
  ) {}

  /** @param address of this machine that the other host sees */
  static async open(address: string, port = 0): Promise<RemoteMesh> {
    const folder = temporaryFolder()
    const stateDir = join(folder, 'state')
    mkdirSync(join(folder, 'model'))
    for (const name of modelFiles)
      cpSync(join(examplesDir, 'tiny-llama', name), join(folder, 'model', name))
    const ports = ['--grpc-port', '0', '--no-dashboard', '--listen', `${address}:${port}`]
    const up = new CliProcess(['--state-dir', stateDir, 'up', '--workers', '0', ...ports, '--json'])
    await up.until(/"type":"mesh"/)
    const mesh = jsonLines(up.stdout)[0] as unknown as { join: JoinLine }
    const endpoint = await liveEndpoint(stateDir)
    assert.ok(endpoint)
    const client = connect({ address: endpoint.grpc, token: endpoint.token })
    return new RemoteMesh(folder, up, client, mesh.join)
  }

  /**
   * Of another host: with a state folder and a cache of its own, and neither the coordinator's nor
   * the model in sight.
   * @param host its name; with the same one it has joined before
   */
  joinFrom(wrapper: string[], host: string, args: string[]): CliProcess {
    const hidden = ['state', 'model'].map(
      (name) => `mount -t tmpfs none ${join(this.folder, name)}`,
    )
    const mounts = [`hostname ${host}`, ...hidden].join(' && ')
    const own = join(this.folder, host)
    return this.#start(['worker', ...args], own, {
      wrapper: [...wrapper, 'unshare', '-m', '-u', 'sh', '-c', `${mounts} && exec "$@"`, 'sh'],
      env: { XDG_CACHE_HOME: join(own, 'cache') },
    })
  }

  /** On the coordinator's own machine. */
  startHere(): CliProcess {
    return this.#start(['worker'], join(this.folder, 'state'), {})
  }

  async submit(settings: Record<string, unknown>): Promise<string> {
    const outputDir = join(this.folder, `output-${++this.#numJobs}`)
    const model = join(this.folder, 'model')
    return (await this.client.submit(tinyJob(outputDir, { model, ...settings }))).jobId
  }

  /** Follows a job to its end; each step must be told once. Answers its weights. */
  async train(jobId: string, onEvent: (event: JobEvent) => void = () => {}): Promise<string> {
    const steps: number[] = []
    for await (const event of this.client.watch(jobId)) {
      if (event.step) steps.push(event.step.step)
      onEvent(event)
    }
    const job = await this.client.get(jobId)
    const words = this.#workers.map(({ stderr }) => stderr).join('\n')
    assert.deepEqual([job.state, job.error], ['SUCCEEDED', null], words)
    assert.deepEqual(
      steps,
      steps.map((_, index) => index + 1),
    )
    return job.weightsSha256
  }

  async close(): Promise<void> {
    for (const worker of this.#workers) worker.child.kill('SIGKILL')
    await Promise.all(this.#workers.map(({ ended }) => ended))
    this.up.interrupt()
    await this.up.ended
    this.client.close()
    rmSync(this.folder, { recursive: true, force: true })
  }

  #start(
    args: string[],
    stateDir: string,
    options: { wrapper?: string[]; env?: NodeJS.ProcessEnv },
  ): CliProcess {
    const all = ['--state-dir', stateDir, ...args, '--threads', '1', '--device', 'cpu']
    const worker = new CliProcess(all, options.env, options.wrapper)
    this.#workers.push(worker)
    return worker
  }
}
