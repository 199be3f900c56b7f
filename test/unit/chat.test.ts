import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { ChatTemplate } from '../../coordinator/chat-template.js'

const user = [{ role: 'user', content: '  hi  ' }]
const render = (source: string, addGenerationPrompt = false) =>
  new ChatTemplate(source, { bos_token: '<s>' }).render(user, addGenerationPrompt)

describe('chat template', () => {
  it('knows special tokens, the generation prompt, and trims blocks as transformers does', () => {
    const source =
      '{{ bos_token }}{% for m in messages %}\n  {% if true %}\n[{{ m.role }}]{{ ' +
      'm["content"] | trim }}\n{% endif %}\n{% endfor %}' +
      '{% if add_generation_prompt %}[assistant]{% endif %}'
    assert.equal(render(source), '<s>[user]hi\n')
    assert.equal(render(source, true), '<s>[user]hi\n[assistant]')
  })

  it('strips the characters that it is told to, not white space', () => {
    assert.equal(render("{{ 'xxaxx'.strip('x') }}|{{ '\\n a\\n'.lstrip('\\n') }}|"), 'a| a\n|')
    assert.equal(render("{{ '\\n a\\n'.rstrip('\\n') }}|{{ ' b '.strip() }}|"), '\n a|b|')
  })

  it('does not know the time, which would change the tokens from day to day', () => {
    const source =
      '{% if strftime_now is defined %}{{ strftime_now("%Y") }}{% else %}fixed{% endif %}'
    assert.equal(render(source), 'fixed')
  })

  it("passes on the template's own refusal, and names a template that does not parse", () => {
    assert.throws(
      () => render("{{ raise_exception('roles must alternate') }}"),
      /^TunemeshError: The model's chat template refuses user: roles must alternate$/,
    )
    assert.throws(
      () => render('{% for m in messages %}'),
      /^TunemeshError: The model's chat template does not parse: /,
    )
  })

  it('counts ranges', () => {
    assert.equal(
      render(
        '{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(1, 6, 2) %}{{ i }}{% ' +
          'endfor %}',
      ),
      '012135',
    )
  })
})
