/**
 * The job file: one schema is its types, defaults, limits and documentation at once.
 *
 * Keys are flat and carry the names of Hugging Face TrainingArguments, PEFT LoraConfig and TRL
 * SFTConfig. proto/job-file.ts reads the YAML; proto/job-file-docs.ts renders docs/job-file.md.
 */
import { z } from 'zod'

const path = z.string().min(1)
const integer = (least: number, most: number) => z.int().min(least).max(most)
const steps = (least = 0) => integer(least, 10_000_000)

/** The linear layers of a decoder block, which is what LoRA may train. */
export const linearModules = [
  'q_proj',
  'k_proj',
  'v_proj',
  'o_proj',
  'gate_proj',
  'up_proj',
  'down_proj',
] as const

const model = {
  model: path.describe(
    'Base model: a Hugging Face folder (config.json, safetensors, tokenizer.json) or a .gguf ' +
      'file. ' +
      'Relative paths start at the folder of the job file.',
  ),
  output_dir: path
    .default('output')
    .describe('Folder for the adapter or model and the run record.'),
  name: z.string().max(100).default('').describe('What lists and pages call the job.'),
}

const data = {
  data: path.describe('Training rows, a .jsonl file: one JSON object a line.'),
  eval_data: z
    .union([path, z.record(z.string().regex(/^[a-z0-9_-]{1,40}$/), path)])
    .nullable()
    .default(null)
    .describe('Validation rows of the same kind: a .jsonl file, or several by name, judged apart.'),
  validation_split: z
    .number()
    .min(0)
    .max(0.5)
    .default(0)
    .describe('Share of the training rows that is held out for validation, chosen by the seed.'),
  kind: z
    .enum(['auto', 'messages', 'prompt_completion', 'text'])
    .default('auto')
    .describe('What a row holds; `auto` decides by its keys. All rows of a job are of one kind.'),
  max_length: integer(8, 1 << 20)
    .nullable()
    .default(null)
    .describe(
      'Most tokens of a row, and with packing the exact length of a pack. ' +
        "null: 1024, or the model's limit where that is less.",
    ),
  packing: z
    .boolean()
    .default(true)
    .describe(
      'Fill packs of exactly `max_length` tokens with whole rows, no attention across rows. ' +
        'false: one row a sequence, padded to a multiple of 64.',
    ),
  on_long_row: z
    .enum(['fail', 'truncate', 'drop'])
    .default('fail')
    .describe('What happens to a row of more than `max_length` tokens.'),
}

const lora = {
  finetuning: z
    .enum(['lora', 'full'])
    .default('lora')
    .describe('Train a low-rank adapter, or every weight.'),
  r: integer(1, 1024).default(16).describe('Rank of the adapter.'),
  lora_alpha: z
    .number()
    .gt(0)
    .max(8192)
    .default(32)
    .describe('The adapter is scaled by lora_alpha / r.'),
  target_modules: z
    .union([
      z.literal('all-linear'),
      z.array(z.enum(linearModules)).min(1).max(linearModules.length),
    ])
    .default('all-linear')
    .describe(`Linears that get an adapter: all-linear, or a list of ${linearModules.join(', ')}.`),
  use_rslora: z.boolean().default(false).describe('Scale by lora_alpha / sqrt(r) instead.'),
  lora_dropout: z
    .literal(0, {
      error: 'adapters are trained without dropout',
    })
    .default(0)
    .describe('Only 0: adapters are trained without dropout.'),
}

const optimizer = {
  learning_rate: z
    .number()
    .min(0)
    .max(10)
    .nullable()
    .default(null)
    .describe('Peak learning rate. null: 2e-4 for lora, 2e-5 for full.'),
  lr_scheduler_type: z
    .enum(['constant', 'constant_with_warmup', 'linear', 'cosine'])
    .default('linear')
    .describe("Shape of the learning rate after warm-up, by Hugging Face's formulas."),
  warmup_steps: steps().default(0).describe('Steps over which the learning rate rises from 0.'),
  warmup_ratio: z
    .number()
    .min(0)
    .max(1)
    .default(0)
    .describe('Warm-up as a share of all steps, where warmup_steps is 0.'),
  optim: z
    .enum(['adamw', 'adamw_torch', 'adamw_torch_fused', 'adamw_8bit'])
    .default('adamw')
    .describe(
      'AdamW under any of these names. adamw_8bit: with moments in 8 bits, an exponent a block ' +
        'of 256, in place of bfloat16; of full fine-tuning in bf16, which it asks for.',
    ),
  weight_decay: z
    .number()
    .min(0)
    .max(10)
    .default(0)
    .describe('Decoupled decay of trained matrices; vectors (norms, biases) do not decay.'),
  adam_beta1: z.number().min(0).lt(1).default(0.9).describe('Decay of the first moment.'),
  adam_beta2: z.number().min(0).lt(1).default(0.999).describe('Decay of the second moment.'),
  adam_epsilon: z
    .number()
    .gt(0)
    .max(1)
    .default(1e-8)
    .describe('Added to the root of the second moment.'),
  max_grad_norm: z
    .number()
    .min(0)
    .max(1e6)
    .default(1)
    .describe('Gradients of a larger norm are scaled down to it. 0: never.'),
  on_non_finite: z
    .enum(['stop', 'skip'])
    .default('stop')
    .describe(
      'What NaN or infinity in a gradient does: stop the job, its last checkpoint intact, or ' +
        'skip the whole step, which counts and changes no weight; ten skipped steps in a row ' +
        'stop it.',
    ),
}

const length = {
  num_train_epochs: z
    .number()
    .gt(0)
    .max(10_000)
    .default(3)
    .describe('Passes over the training rows.'),
  max_steps: z
    .union([z.literal(-1), steps(1)])
    .default(-1)
    .describe('Optimizer steps; where it is not -1 it overrides num_train_epochs.'),
  per_device_train_batch_size: integer(1, 4096)
    .default(1)
    .describe('Packs of a micro-batch, the unit of work that a worker computes at once.'),
  gradient_accumulation_steps: integer(1, 65_536)
    .default(8)
    .describe('Micro-batches of an optimizer step, whatever the number of workers is.'),
  seed: integer(0, 2 ** 32 - 1)
    .default(42)
    .describe('Fixes the order of the rows, the split and the start of the adapter.'),
}

const cadence = {
  logging_steps: steps(1)
    .nullable()
    .default(null)
    .describe(
      'Steps between the lines that `train`, `resume` and `logs` print, besides the first and ' +
        'last. null: `logs` prints every step, `train` about a hundred of a long job. A ' +
        "terminal's progress bar, `--json` and the page have every step.",
    ),
  save_steps: steps().default(50).describe('Steps between checkpoints. 0: only at the end.'),
  save_total_limit: integer(2, 1000).default(2).describe('Checkpoints that are kept, the newest.'),
  eval_steps: steps()
    .default(50)
    .describe('Steps between validations, where there are such rows. ' + '0: only at the end.'),
  eval_on_start: z.boolean().default(false).describe('Also validate before the first step.'),
}

const numerics = {
  gradient_codec: z
    .enum(['q24', 'q12', 'q8'])
    .default('q24')
    .describe(
      'Rounding of gradients on the wire. q24 is as good as float32; q12 and q8 are lossy.',
    ),
  bf16: z
    .union([z.literal('auto'), z.boolean()])
    .default('auto')
    .describe(
      'Compute in bfloat16; what an adapter trains stays float32. auto: where every ' +
        'worker that is there when the job is first planned has a GPU, else in float32; a job ' +
        'keeps what it began with. true: on GPUs only, workers without one stay idle.',
    ),
  load_in_fp8: z
    .boolean()
    .default(false)
    .describe(
      "Keep the linears of LoRA's frozen base in 8 bits (e4m3, a scale a row) and multiply them " +
        'as such; all else is bfloat16. On Hopper GPUs (H100, H200), other workers stay idle.',
    ),
  fp32_master: z
    .boolean()
    .default(false)
    .describe(
      'Full fine-tuning in bf16 keeps weights and moments in bfloat16 too, rounded ' +
        'stochastically at each update: 6 bytes a parameter beside the gradient. true: float32 ' +
        'master weights and moments instead, 14 bytes. In float32, and for adapters, always so.',
    ),
  deterministic: z
    .boolean()
    .default(true)
    .describe(
      'The same job gives the same weights to the bit. false: free mode, in which a GPU may add ' +
        'in whatever order is fastest; no two runs end alike, and steps that no worker holds any ' +
        'more are rolled back to the last checkpoint.',
    ),
  dtype: z.enum(['float32']).default('float32').describe('Arithmetic of the weights.'),
}

const autoOrBoolean = z.union([z.literal('auto'), z.boolean()]).default('auto')

const memory = {
  gradient_checkpointing: autoOrBoolean.describe(
    'Keep only the input of each layer and compute the layer again in backward. auto: of as many ' +
      "layers, or of their MLPs, as it takes to fit a GPU's memory. Changes no result.",
  ),
  activation_offloading: autoOrBoolean.describe(
    'Move what layers keep to host memory until backward. auto: of as many layers as it takes to ' +
      "fit a GPU's memory, where that is faster than computing again. Changes no result.",
  ),
}

export const jobSpecSchema = z.strictObject({
  ...model,
  ...data,
  ...lora,
  ...length,
  ...optimizer,
  ...cadence,
  ...numerics,
  ...memory,
})

/** A job file with its defaults filled in. */
export type JobSpec = z.output<typeof jobSpecSchema>
export type JobKey = keyof JobSpec

/** Every key, in the order of the documentation. */
export const jobKeys = Object.keys(jobSpecSchema.shape) as JobKey[]

/** Names that other fine-tuners give to our keys: named in the refusal. */
export const foreignKeys: Readonly<Record<string, JobKey>> = {
  model_name_or_path: 'model',
  base_model: 'model',
  model_name: 'model',
  dataset: 'data',
  dataset_path: 'data',
  train_data: 'data',
  train_file: 'data',
  training_file: 'data',
  datasets: 'data',
  eval_file: 'eval_data',
  validation_file: 'eval_data',
  eval_dataset: 'eval_data',
  val_size: 'validation_split',
  val_set_size: 'validation_split',
  output_path: 'output_dir',
  finetuning_type: 'finetuning',
  fine_tune_type: 'finetuning',
  adapter: 'finetuning',
  lora_r: 'r',
  lora_rank: 'r',
  rank: 'r',
  alpha: 'lora_alpha',
  lora_target: 'target_modules',
  lora_target_modules: 'target_modules',
  lora_trainable_modules: 'target_modules',
  lr: 'learning_rate',
  lr_scheduler: 'lr_scheduler_type',
  optimizer: 'optim',
  clip_grad_norm: 'max_grad_norm',
  num_epochs: 'num_train_epochs',
  epochs: 'num_train_epochs',
  n_epochs: 'num_train_epochs',
  iters: 'max_steps',
  steps: 'max_steps',
  batch_size: 'per_device_train_batch_size',
  micro_batch_size: 'per_device_train_batch_size',
  grad_accumulation_steps: 'gradient_accumulation_steps',
  sequence_len: 'max_length',
  cutoff_len: 'max_length',
  max_seq_length: 'max_length',
  max_seq_len: 'max_length',
  sample_packing: 'packing',
  excess_length_strategy: 'on_long_row',
  save_every: 'save_steps',
  torch_dtype: 'dtype',
  mixed_precision: 'bf16',
  fp8: 'load_in_fp8',
  full_determinism: 'deterministic',
  use_gradient_checkpointing: 'gradient_checkpointing',
  enable_activation_checkpointing: 'gradient_checkpointing',
  enable_activation_offloading: 'activation_offloading',
}

/** What one key alone cannot say. Returns [key, problem] pairs. */
export function crossFieldProblems(spec: JobSpec): [JobKey, string][] {
  const problems: [JobKey, string][] = []
  const check = (isFine: boolean, key: JobKey, problem: string) => {
    if (!isFine) problems.push([key, problem])
  }
  check(
    spec.eval_data === null || spec.validation_split === 0,
    'validation_split',
    `${spec.validation_split} is given beside eval_data. Keep one of the two.`,
  )
  check(
    spec.warmup_steps === 0 || spec.warmup_ratio === 0,
    'warmup_ratio',
    `${spec.warmup_ratio} is given beside warmup_steps ${spec.warmup_steps}. Keep one of the two.`,
  )
  check(
    spec.max_steps === -1 || spec.warmup_steps <= spec.max_steps,
    'warmup_steps',
    `${spec.warmup_steps} is more than max_steps ${spec.max_steps}. Use at most ${spec.max_steps}.`,
  )
  const warmsUp = spec.warmup_steps > 0 || spec.warmup_ratio > 0
  check(
    spec.lr_scheduler_type !== 'constant' || !warmsUp,
    'lr_scheduler_type',
    'constant has no warm-up, which is also given. Use constant_with_warmup.',
  )
  check(
    spec.target_modules === 'all-linear' ||
      new Set(spec.target_modules).size === spec.target_modules.length,
    'target_modules',
    `${spec.target_modules} names a module twice. Name each once.`,
  )
  const isBytes = spec.optim === 'adamw_8bit'
  check(
    !isBytes || spec.finetuning === 'full',
    'optim',
    'adamw_8bit is of full fine-tuning: moments of adapters stay float32. Use adamw.',
  )
  check(
    !isBytes || spec.bf16 !== false,
    'optim',
    'adamw_8bit computes in bfloat16, and bf16 is false. Leave bf16 out, or use adamw.',
  )
  check(
    !isBytes || !spec.fp32_master,
    'optim',
    'adamw_8bit is given beside fp32_master, which keeps moments in float32. Keep one of them.',
  )
  check(
    !spec.load_in_fp8 || spec.finetuning === 'lora',
    'load_in_fp8',
    'true is of a frozen base, which full fine-tuning has not. Use bf16, or finetuning: lora.',
  )
  check(
    !spec.load_in_fp8 || spec.bf16 !== false,
    'load_in_fp8',
    'true computes all else in bfloat16, and bf16 is false. Leave bf16 out.',
  )
  check(
    spec.gradient_checkpointing !== true || spec.activation_offloading !== true,
    'activation_offloading',
    'true is given beside gradient_checkpointing, which leaves nothing to move. Keep one of them.',
  )
  return problems
}

/** Peak learning rate, with the default of the method. */
export const peakLearningRate = (spec: JobSpec): number =>
  spec.learning_rate ?? (spec.finetuning === 'lora' ? 2e-4 : 2e-5)
