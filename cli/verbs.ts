/** All verbs with their arguments, as the help shows them; each runs the file of its name. */
import { type Command, InvalidArgumentError } from 'commander'
import { type ChatOptions, chat } from './chat.js'
import type { Context } from './context.js'
import { defaultPorts } from './default-ports.js'
import { type DoctorOptions, doctor } from './doctor.js'
import { type FleetOptions, fleet } from './fleet.js'
import { type JobsOptions, jobs } from './jobs.js'
import { type LogsOptions, logs } from './logs.js'
import { type PlanOptions, plan } from './plan.js'
import { resume } from './resume.js'
import { stop } from './stop.js'
import { type TokenOptions, token } from './token.js'
import { type TrainOptions, train } from './train.js'
import { type UpOptions, up } from './up.js'
import { type WorkerOptions, worker } from './worker.js'

type ContextNow = () => Context

export function addVerbs(program: Command, context: ContextNow): void {
  addTraining(program, context)
  addMesh(program, context)
  addJobs(program, context)
  addChat(program, context)
  program
    .command('doctor')
    .description('check this machine, and say what to do about what is missing')
    .option('--install-libs <folder>', "put NVIDIA's cuBLASLt and cuDNN there (0.9 GB to fetch)")
    .option('--index <url>', 'package index to fetch from (default: pip, else PIP_INDEX_URL)')
    .action((options: DoctorOptions) => doctor(context(), options))
}

function addTraining(program: Command, context: ContextNow): void {
  const set = ['--set <key=value>', 'override a key of the job file (repeatable)'] as const
  fleetOptions(program.command('train').argument('<job.yaml>', 'job file'))
    .description('train a job, on a mesh of its own unless one runs already')
    .option(set[0], set[1], collect)
    .option('--output-dir <path>', 'where the result goes (overrides output_dir)')
    .addHelpText('after', examples(['train job.yaml --workers 2', 'train job.yaml --set r=8']))
    .action((path: string, options: TrainOptions) => train(context(), path, options))

  program
    .command('plan')
    .argument('<job.yaml>', 'job file')
    .description('check the data and plan memory and length; trains nothing')
    .option(set[0], set[1], collect)
    .option('--output-dir <path>', 'where the result would go')
    .option(...deviceOption)
    .addHelpText('after', examples(['plan job.yaml', 'plan job.yaml --json']))
    .action((path: string, options: PlanOptions) => plan(context(), path, options))

  fleetOptions(program.command('resume').argument('[job]', 'default: the newest that can go on'))
    .description('go on from the last checkpoint of a stopped or failed job')
    .action((job: string | undefined, options: TrainOptions) => resume(context(), job, options))
}

const fleetOptions = (command: Command) =>
  command
    .option('--workers <n>', 'workers of an embedded mesh (default: 1)', positive)
    .option('--threads <n>', 'threads of each worker (default: processors / workers)', positive)
    .option(...deviceOption)
    .option('--no-dashboard', 'no dashboard')

function addMesh(program: Command, context: ContextNow): void {
  program
    .command('up')
    .description('run a coordinator that stays, with a dashboard')
    .option('--workers <n>', 'workers on this machine', count, 1)
    .option('--threads <n>', 'threads of each worker', positive)
    .option(...deviceOption)
    .option('--grpc-port <port>', 'port for clients and workers', port, defaultPorts.grpc)
    .option('--dashboard-port <port>', 'port of the dashboard', port, defaultPorts.dashboard)
    .option('--no-dashboard', 'no dashboard')
    .option('--listen <address>', 'let workers of other hosts join here, by TLS: HOST or HOST:PORT')
    .option(...tokenTtl)
    .addHelpText('after', examples(['up', 'up --listen 0.0.0.0', 'up --listen 192.168.1.5:8472']))
    .action((options: UpOptions) => up(context(), options))

  program
    .command('worker')
    .description('join a coordinator with one worker of this machine')
    .option('--join <url>', 'the coordinator (default: the one of the state folder)')
    .option('--token <token>', 'join token of a coordinator on another host, for the first start')
    .option('--wait <s>', 'how long to go on trying while it can not be reached', seconds, 600)
    .option('--threads <n>', 'threads to compute with (default: all)', positive)
    .option(...deviceOption)
    .addHelpText(
      'after',
      examples(['worker', 'worker --join https://192.168.1.5:8472 --token TOKEN']),
    )
    .action((options: WorkerOptions) => worker(context(), options))

  program
    .command('fleet')
    .description('list hosts, workers and devices of the mesh that runs')
    .option('-w, --watch', 'go on as they change; Ctrl-C ends it', false)
    .option('--interval <s>', 'seconds between two looks', seconds, 1)
    .option(
      '--revoke <host>',
      'put a joined host out, by name or identity (repeatable)',
      collect,
      [],
    )
    .action((options: FleetOptions) => fleet(context(), options))

  program
    .command('token')
    .description('print a join line for workers of other hosts')
    .option(...tokenTtl)
    .option('--uses <n>', 'how many hosts may join by it', positive, 1)
    .action((options: TokenOptions) => token(context(), options))
}

function addJobs(program: Command, context: ContextNow): void {
  program
    .command('jobs')
    .argument('[job]', 'one job in full')
    .description('list jobs')
    .option('--limit <n>', 'at most so many', positive, 20)
    .action((job: string | undefined, options: JobsOptions) => jobs(context(), job, options))

  program
    .command('logs')
    .argument('[job]', 'default: the newest')
    .description("print a job's events")
    .option('-f, --follow', 'go on with what happens; Ctrl-C leaves the job alone', false)
    .option('--after <sequence>', 'only events after this number', natural, 0)
    .action((job: string | undefined, options: LogsOptions) => logs(context(), job, options))

  program
    .command('stop')
    .argument('<job>')
    .description('checkpoint and stop a job')
    .option('--now', 'drop the step under way', false)
    .action((job: string, options: { now: boolean }) => stop(context(), job, options))
}

function addChat(program: Command, context: ContextNow): void {
  program
    .command('chat')
    .argument('[job]', 'default: the newest that succeeded')
    .description('talk to a tuned model')
    .option('--model <path>', 'a base model instead of a job')
    .option('--adapter <path>', 'a PEFT adapter folder')
    .option('--prompt <text>', 'one question, then end')
    .option('--system <text>', 'system message')
    .option('--max-new-tokens <n>', 'longest answer in tokens', positive, 256)
    .option('--temperature <t>', '0: always the likeliest token', nonNegative, 0)
    .option('--top-p <p>', 'sample from this share of the likeliest', share, 1)
    .option('--seed <n>', 'seed of the sampling', natural, 0)
    .option('--threads <n>', 'threads of an embedded worker', positive)
    .option(...deviceOption)
    .addHelpText('after', examples(['chat', 'chat --prompt "What is metformin?"']))
    .action((job: string | undefined, options: ChatOptions) => chat(context(), job, options))
}

const examples = (lines: string[]) =>
  `\nExamples:\n${lines.map((line) => `  $ tunemesh ${line}`).join('\n')}`

const collect = (value: string, earlier: string[] | undefined) => [...(earlier ?? []), value]

function numberWithin(least: number, most: number, whole: boolean) {
  const kind = whole ? 'a whole number' : 'a number'
  return (text: string): number => {
    const value = Number(text)
    const isRight = text.trim() !== '' && value >= least && value <= most
    if (!isRight || (whole && !Number.isInteger(value))) {
      throw new InvalidArgumentError(`It must be ${kind} from ${least} to ${most}.`)
    }
    return value
  }
}

/** As the coordinator and the workers take it. */
function device(text: string): string {
  if (/^(auto|cpu|cuda:\d{1,3})$/.test(text)) return text
  throw new InvalidArgumentError('It must be auto, cpu or cuda:N, for example cuda:0.')
}

const deviceOption = [
  '--device <device>',
  'auto (the GPUs in turn, else the CPU), cpu, or cuda:N (default: auto)',
  device,
] as const

/** In seconds: 90, 90s, 15m, 1h, 2d. */
function duration(text: string): number {
  const [, number = '', unit = 's'] = /^(\d+)([smhd]?)$/.exec(text) ?? []
  const seconds = Number(number) * ({ s: 1, m: 60, h: 3_600, d: 86_400 }[unit || 's'] ?? 1)
  if (number !== '' && seconds >= 1 && seconds <= 30 * 86_400) return seconds
  throw new InvalidArgumentError('It must be a time from 1s to 30d, for example 15m, 1h or 2d.')
}

const tokenTtl = [
  '--token-ttl <time>',
  'how long the join token counts, for example 15m or 1d (default: 1h)',
  duration,
  3_600,
] as const

const positive = numberWithin(1, 65_536, true)
const count = numberWithin(0, 65_536, true)
const natural = numberWithin(0, Number.MAX_SAFE_INTEGER, true)
const port = numberWithin(0, 65_535, true)
const nonNegative = numberWithin(0, 100, false)
const seconds = numberWithin(0.1, 86_400, false)
const share = numberWithin(0, 1, false)
