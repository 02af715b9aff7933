"""How stages set a model over HTTP up: what their configs say, what it cost.

The fields are those of `configs.common.endpoint`. What is answered is kept in
`answers/` beside the stages' folders, by request: not only a killed run, but
also one with another limit asks for nothing twice.
"""

import json
import pathlib
from typing import Any

from gr2_jax.pipeline import artifacts
from gr2_jax.teachers import endpoint, ledger

ANSWERS = 'answers'  # a folder beside the stages'


def settings(section: str, stage, temperature: float) -> endpoint.Settings:
  """How a model is asked.

  Args:
    section: the name of `stage`, for errors.
    stage: the fields of `common.endpoint`.
    temperature: of its answers, unless `request` has another.

  Raises:
    ValueError: `request` is no JSON object.
  """
  try:
    more = json.loads(stage.request or '{}')
    fields = {
      'temperature': temperature,
      'max_tokens': stage.answer_tokens,
    } | more
  except (ValueError, TypeError) as e:
    raise ValueError(
      f'{section}.request must be a JSON object or empty ({e})'
    ) from e
  return endpoint.Settings(
    base_url=stage.endpoint,
    model=stage.model,
    key_variable=stage.key_variable,
    fields={k: v for k, v in fields.items() if v is not None},
    answer_tokens=stage.answer_tokens,
    concurrency=stage.concurrency,
    timeout=stage.timeout,
    retries=stage.retries,
    section=section,
  )


def book(
  section: str, stage, workdir: pathlib.Path, who: list[object]
) -> ledger.Ledger:
  """Opens the file of the answers of those who are asked.

  Args:
    section: the name of `stage`, for errors.
    stage: token_limit; the limit is of the file.
    workdir: of the stage.
    who: what tells them apart from others.
  """
  name = ledger.key(artifacts.dumps(who))[:8]
  path = workdir.parent / ANSWERS / f'{name}.jsonl'
  return ledger.Ledger(path, stage.token_limit or None, section)


def spent(stage, usage: dict[str, Any]) -> dict[str, Any]:
  """Adds what answers cost, None where no price is given.

  Args:
    stage: model, prompt_price, answer_price.
    usage: prompt_tokens and completion_tokens, beside others.
  """
  cost = None
  if stage.prompt_price or stage.answer_price:
    cost = (
      usage['prompt_tokens'] * stage.prompt_price
      + usage['completion_tokens'] * stage.answer_price
    ) / 1e6
  return {'model': stage.model, **usage, 'cost': cost}
