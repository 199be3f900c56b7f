/** Answers to PlanCall and GenerateCall: what a client asks of an engine outside of training. */
import { TunemeshError } from '../proto/errors.js'
import type { ErrorInfo } from '../proto/gen/tunemesh/v1/ErrorInfo.js'
import type { FromWorker } from '../proto/gen/tunemesh/v1/FromWorker.js'
import type { GenerateCall__Output } from '../proto/gen/tunemesh/v1/GenerateCall.js'
import type { PlanCall__Output } from '../proto/gen/tunemesh/v1/PlanCall.js'
import type { PlanResult } from '../proto/gen/tunemesh/v1/PlanResult.js'
import type { ModelConfig } from '../proto/model-config.js'
import type { TrainRequest } from '../proto/train-spec.js'
import type { DeviceOptions } from './device.js'
import { type Engine, openEngine } from './engine.js'
import type { JobFiles } from './job-files.js'

const aliveEveryMs = 10_000

interface LoadedModel {
  key: string
  engine: Engine
}

export class EngineCalls {
  /** The model of the last conversation stays loaded: a chat asks again and again. */
  #loaded: LoadedModel | null = null
  readonly #running = new Map<string, AbortController>()
  #tail: Promise<void> = Promise.resolve()

  constructor(
    private readonly device: DeviceOptions,
    private readonly files: Pick<JobFiles, 'place'>,
    private readonly send: (message: FromWorker) => void,
  ) {}

  plan(call: PlanCall__Output): void {
    void this.#plan(call).then((result) =>
      this.send({ planResult: { callId: call.callId, ...result } }),
    )
  }

  async #plan(call: PlanCall__Output): Promise<PlanResult> {
    let engine: Engine | null = null
    try {
      const { config, spec } = JSON.parse(call.trainSpecJson) as TrainRequest
      const { modelPath } = call
      const { precision, deterministic } = spec
      engine = openEngine({ modelPath, config, precision, deterministic, ...this.device })
      const { totalBytes, uses, layers, numTrainedParameters, numBlocks } = engine.plan(spec)
      const plan = { memory: { totalBytes, uses, layers }, numTrainedParameters, numBlocks }
      if (!call.withSpeed) return plan
      const rate = await engine.productRate(spec.tokensPerMicroBatch)
      const { flopsPerSecond, measuredSeconds } = rate
      return { ...plan, productFlopsPerSecond: flopsPerSecond, measuredSeconds }
    } catch (error) {
      return { error: errorInfo(error) }
    } finally {
      await engine?.close()
    }
  }

  generate(call: GenerateCall__Output): void {
    if (call.cancel) return this.#running.get(call.callId)?.abort()
    const abort = new AbortController()
    this.#running.set(call.callId, abort)
    this.#tail = this.#tail.then(() => this.#generate(call, abort.signal))
  }

  /** Resolves when the model's memory is given back: before a job takes its own, and at the end. */
  async release(): Promise<void> {
    for (const abort of this.#running.values()) abort.abort()
    this.#tail = this.#tail.then(() => this.#unload())
    await this.#tail
  }

  async #generate(call: GenerateCall__Output, signal: AbortSignal): Promise<void> {
    const { callId } = call
    try {
      const engine = await this.#model(call, signal)
      const request = call.request
      const options = {
        promptIds: Int32Array.from(call.promptIds),
        maxNewTokens: request?.maxNewTokens || 256,
        temperature: request?.temperature ?? 0,
        topP: request?.topP || 1,
        seed: BigInt(request?.seed ?? 0),
        stopIds: call.stopIds,
      }
      const onToken = (id: number) => this.send({ generateResult: { callId, tokenIds: [id] } })
      const { finishReason } = await engine.generate(options, onToken, signal)
      this.send({ generateResult: { callId, done: true, finishReason } })
    } catch (error) {
      this.send({ generateResult: { callId, done: true, error: errorInfo(error) } })
    } finally {
      this.#running.delete(callId)
    }
  }

  async #model(call: GenerateCall__Output, signal: AbortSignal): Promise<Engine> {
    const { modelPath, modelFiles, adapterPath, adapterFiles, modelConfigJson } = call
    const precision = (['bf16', 'fp8'] as const).find((it) => it === call.precision) ?? 'fp32'
    const files = [modelPath, modelFiles, adapterPath, adapterFiles]
    const key = JSON.stringify([...files, modelConfigJson, precision])
    if (this.#loaded?.key === key) return this.#loaded.engine
    await this.#unload()
    // A model that is fetched first takes longer than the coordinator waits for a silent worker.
    const alive = setInterval(
      () => this.send({ generateResult: { callId: call.callId, tokenIds: [] } }),
      aliveEveryMs,
    )
    try {
      const place = await this.files.place({ path: modelPath, files: modelFiles }, signal)
      const adapter = await this.files.place({ path: adapterPath, files: adapterFiles }, signal)
      const config = JSON.parse(modelConfigJson) as ModelConfig
      const engine = openEngine({ modelPath: place, config, precision, ...this.device })
      this.#loaded = { key, engine }
      await engine.load()
      if (adapter) await engine.loadAdapter(adapter)
      return engine
    } catch (error) {
      await this.#unload()
      throw error
    } finally {
      clearInterval(alive)
    }
  }

  async #unload(): Promise<void> {
    const loaded = this.#loaded
    this.#loaded = null
    await loaded?.engine.close()
  }
}

function errorInfo(error: unknown): ErrorInfo {
  if (error instanceof TunemeshError) {
    return { code: error.code, message: error.message, details: error.details }
  }
  return { code: 'ENGINE_FAILED', message: error instanceof Error ? error.message : String(error) }
}
