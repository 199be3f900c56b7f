/** Events of a run that never was, the same for the same seed: for tests of what shows a run. */
import type { FeedEvent } from '../../dashboard/feed-messages.js'

export type MockEvent = Omit<FeedEvent, 'sequence' | 'jobId' | 'timeMs'>

export const mockWorkers = [
  { workerId: 'w-1', host: 'anvil', device: 'cpu: 2 threads, avx512', state: 'training' },
  { workerId: 'w-2', host: 'anvil', device: 'cpu: 2 threads, avx512', state: 'training' },
].map((worker, i) => ({ ...worker, tokensPerSecond: 0, memoryBytes: (700 + 12 * i) * 2 ** 20 }))

export function mockPrelude(numSteps: number): MockEvent[] {
  return [
    { stateChanged: { state: 'VALIDATING' } },
    { preflight: mockPreflight },
    {
      plan: {
        numSteps,
        microBatchesPerStep: 8,
        numTrainedParameters: 4_884_480,
        memory: { totalBytes: 912 * 2 ** 20, uses: [{ purpose: 'weights', sizeBytes: 540e6 }] },
      },
    },
    { stateChanged: { state: 'QUEUED' } },
    { fleet: { fleetEpoch: 1, reason: 'w-1 joined', workers: mockWorkers.slice(0, 1) } },
    { fleet: { fleetEpoch: 2, reason: 'w-2 joined', workers: mockWorkers } },
    { stateChanged: { state: 'RUNNING' } },
  ]
}

export function mockStep(step: number, numSteps: number): MockEvent {
  const noise = Math.sin(step * 12.9898) * 0.14 + Math.sin(step * 78.233) * 0.1
  const warm = Math.min(1, step / 6)
  const done = step / numSteps
  return {
    step: {
      step,
      numSteps,
      loss: 1.45 + 2.1 * Math.exp(-step / (numSteps / 4)) + noise,
      gradNorm: 0.6 + 1.4 * Math.exp(-step / 9) + Math.abs(noise),
      learningRate: 2e-4 * warm * (0.5 + 0.5 * Math.cos(Math.PI * done)),
      numTargetTokens: 290,
      numTokens: 512,
      stepMs: 640 + 60 * noise,
      exposedMs: 19 + 30 * Math.abs(noise),
      tokensPerSecond: 800 + 90 * noise,
      dataEpoch: step / 20,
      etaMs: (numSteps - step) * 640,
      fleetEpoch: 2,
      shares: [
        { workerId: 'w-1', numMicroBatches: 5, tokensPerSecond: 488 },
        { workerId: 'w-2', numMicroBatches: 3, tokensPerSecond: 311 },
      ],
    },
  }
}

const mockPreflight: NonNullable<FeedEvent['preflight']> = {
  kind: 'messages',
  numRows: 64,
  numUsedRows: 64,
  numTokens: 3_912,
  numTargetTokens: 2_107,
  numPacks: 16,
  stopTokenTrained: true,
  histogram: [2, 9, 18, 14, 11, 6, 3, 1].map((numRows, i) => ({
    upToTokens: 32 * (i + 1),
    numRows,
  })),
  findings: [],
  samples: [
    {
      file: 'train.jsonl',
      line: 1,
      spans: [
        {
          text: '<|im_start|>user\nWhat is metformin?<|im_end|>\n<|im_start|>assistant\n',
          trained: false,
        },
        {
          text: 'an antidiabetic drug (trade name Glucophage) for type II diabetes<|im_end|>',
          trained: true,
        },
      ],
    },
    {
      file: 'train.jsonl',
      line: 37,
      spans: [
        {
          text: '<|im_start|>user\nWhat is <b>aspirin</b>?<|im_end|>\n<|im_start|>assistant\n',
          trained: false,
        },
        { text: 'the acetylated derivative of salicylic acid<|im_end|>', trained: true },
      ],
    },
  ],
}
