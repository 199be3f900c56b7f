/** Renders conversations through a model's Jinja chat template, as transformers does. */
import { Environment, Interpreter, Template } from '@huggingface/jinja'
import { TunemeshError } from '../proto/errors.js'
import type { TokenizerFiles } from './tokenizer.js'

export interface ChatMessage {
  role: string
  content: string
}

export class ChatTemplate {
  private readonly template: Template

  /** @throws TunemeshError CHAT_TEMPLATE_INVALID */
  constructor(
    source: string,
    private readonly specialTokens: Record<string, string>,
  ) {
    try {
      this.template = new Template(source)
      giveStripItsArgument(this.template.parsed)
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause)
      const message = `The model's chat template does not parse: ${reason}`
      throw new TunemeshError('CHAT_TEMPLATE_INVALID', message, { cause })
    }
  }

  /** null where the model has no template. */
  static of(files: TokenizerFiles): ChatTemplate | null {
    return files.chatTemplate === null
      ? null
      : new ChatTemplate(files.chatTemplate, files.specialTokens)
  }

  /**
   * The text of a conversation; with `addGenerationPrompt` ready for the assistant's next turn.
   *
   * `strftime_now` is left undefined: a template that prints today's date would give other tokens
   * tomorrow. Such templates have a fixed date for this case.
   */
  render(messages: readonly ChatMessage[], addGenerationPrompt: boolean): string {
    try {
      const environment = new Environment()
      const variables = {
        ...constants,
        ...this.specialTokens,
        messages,
        add_generation_prompt: addGenerationPrompt,
        tools: null,
        documents: null,
      }
      for (const [name, value] of Object.entries(variables)) environment.set(name, value)
      const text: unknown = new Interpreter(environment).run(this.template.parsed).value
      return String(text)
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause)
      throw new TunemeshError(
        'CHAT_TEMPLATE_INVALID',
        `The model's chat template refuses ${messages.map(({ role }) => role).join(', ')}: ` +
          `${reason}`,
        { cause },
      )
    }
  }
}

/**
 * Turns `text.strip("x")` into `strip_characters(text, "x")`, likewise lstrip and rstrip: the
 * library's own methods ignore the argument and strip all white space (Qwen3's template shows it).
 */
function giveStripItsArgument(node: unknown): void {
  if (Array.isArray(node)) for (const child of node) giveStripItsArgument(child)
  if (typeof node !== 'object' || node === null) return
  for (const child of Object.values(node)) giveStripItsArgument(child)
  const call = node as { type?: string; args?: unknown[]; callee?: MemberNode }
  if (call.type !== 'CallExpression' || call.callee?.type !== 'MemberExpression') return
  const { object, property, computed } = call.callee
  const name = computed ? undefined : String(property.value)
  if (call.args?.length !== 1 || !/^[lr]?strip$/.test(name ?? '')) return
  call.args = [object, ...call.args]
  call.callee.type = 'Identifier'
  call.callee.value = `${name}_characters`
}

interface MemberNode {
  type: string
  object: unknown
  property: { value?: unknown }
  computed: boolean
  value?: unknown
}

function stripStart(text: string, characters: string): string {
  let start = 0
  while (start < text.length && characters.includes(text.charAt(start))) start += 1
  return text.slice(start)
}

function stripEnd(text: string, characters: string): string {
  let end = text.length
  while (end > 0 && characters.includes(text.charAt(end - 1))) end -= 1
  return text.slice(0, end)
}

function raise(reason: string): never {
  throw new Error(reason)
}

function range(start: number, stop?: number, step = 1): number[] {
  const [from, to] = stop === undefined ? [0, start] : [start, stop]
  return Array.from(
    { length: Math.max(0, Math.ceil((to - from) / step)) },
    (_, i) => from + i * step,
  )
}

/** Jinja's own names: Template.render would add the clock to them. */
const constants = {
  true: true,
  false: false,
  none: null,
  True: true,
  False: false,
  None: null,
  raise_exception: raise,
  range,
  lstrip_characters: stripStart,
  rstrip_characters: stripEnd,
  strip_characters: (text: string, characters: string) =>
    stripEnd(stripStart(text, characters), characters),
}
