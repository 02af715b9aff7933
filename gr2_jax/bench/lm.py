"""Prefill and decode compared with transformers: same weights and tokens.

python -m gr2_jax.bench.lm

SmolLM2-135M (or, with --tiny, a small random decoder) continues random prompts
greedily, in float32 on the CPU, in this library and in transformers with its
key-value cache. Rounds alternate between the two in one process; the first
compiles and does not count. `prefill` ends with the logits of the last prompt
token; `decode` is the rest of a whole continuation.

Axes: P prompts, T time, V vocabulary.
"""

import dataclasses
import itertools
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

from gr2_jax import bench, hf
from gr2_jax.distributed import sharding
from gr2_jax.models import transformer
from gr2_jax.pipeline import reporting
from gr2_jax.policy import sampling

_TINY = flags.DEFINE_bool('tiny', False, 'A small random decoder.')
_BATCHES = flags.DEFINE_list('batches', ['1', '8'], 'Prompts at a time.')
_PROMPT = flags.DEFINE_integer('prompt', 128, 'Tokens of a prompt.', 1)
_TOKENS = flags.DEFINE_integer('tokens', 64, 'Tokens decoded.', 2)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'Counted rounds.', 1)

TINY = transformer.TransformerConfig(
  vocab_size=512, d_model=64, num_layers=2, d_ff=192, tie_embeddings=False
)
NO_WORDS = '{"model": {"vocab": {"a": 0}}, "added_tokens": []}'
PHASES = ('prefill', 'whole')

# Phase -> a function of int32 [P, T] prompts that returns, on the host, the
# logits float32 [P, V] of `prefill`, or the tokens int [P, T] of `whole`.
Side = dict[str, Callable[[np.ndarray], np.ndarray]]


def load() -> tuple[str, transformer.TransformerConfig, Any]:
  """Family, decoder and parameters of the measured model."""
  if _TINY.value:
    boxed = transformer.init_params(TINY, jax.random.key(0))
    return 'qwen3', TINY, sharding.unbox(boxed)
  backbone = hf.open_backbone('smollm2')
  model = backbone.model
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = hf.importing.abstract_params(model)
  shardings = jax.tree.map(lambda x: one, shapes)
  return backbone.family, model, hf.import_params(backbone, model, shardings)


def our_side(
  model: transformer.TransformerConfig, params: Any, tokens: int
) -> Side:
  """This library."""

  @jax.jit
  def prefill(params, prompts):
    length = jnp.full(prompts.shape[0], prompts.shape[1])
    hidden, _ = transformer.encode_prompt(model, params, prompts, length)
    return hidden[:, -1] @ transformer.output_embedding(params).T

  @jax.jit
  def whole(params, prompts):
    length = jnp.full(prompts.shape[0], prompts.shape[1])
    return sampling.generate(
      model, params, prompts, length, tokens, eos=-1, pad=0
    ).tokens[:, 0]

  return {
    phase: lambda prompts, f=f: np.asarray(f(params, prompts))
    for phase, f in (('prefill', prefill), ('whole', whole))
  }


def their_side(folder: pathlib.Path, tokens: int) -> Side:
  """Transformers, on the checkpoint in `folder`."""
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32
  ).eval()

  def run(ids, cache=None):
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

  @torch.inference_mode()
  def prefill(prompts):
    return run(torch.tensor(prompts, dtype=torch.int64)).logits[:, -1].numpy()

  @torch.inference_mode()
  def whole(prompts):
    out = run(torch.tensor(prompts, dtype=torch.int64))
    tokens_out = [out.logits[:, -1:].argmax(-1)]
    while len(tokens_out) < tokens:
      out = run(tokens_out[-1], out.past_key_values)
      tokens_out.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(tokens_out, 1).numpy()

  return {'prefill': prefill, 'whole': whole}


@dataclasses.dataclass(frozen=True)
class Seconds:
  """One side: the first call of each phase, medians of the later ones."""

  first: dict[str, float]
  prefill: float
  decode: float


def measure(
  sides: dict[str, Side], prompts: np.ndarray, rounds: int
) -> dict[str, Seconds]:
  """Alternates the sides, and compares their results.

  Raises:
    RuntimeError: the logits differ by more than 1e-3.
  """
  seconds = {
    name: {phase: [] for phase in PHASES} for name in sides
  }  # by round, the first one included
  results: dict[str, dict[str, np.ndarray]] = {name: {} for name in sides}
  with reporting.progress(rounds + 1, 'lm', unit='round') as bar:
    for _ in range(rounds + 1):
      for phase, (name, side) in itertools.product(PHASES, sides.items()):
        begin = time.perf_counter()
        results[name][phase] = side[phase](prompts)
        seconds[name][phase].append(time.perf_counter() - begin)
      bar.update(1)
  ours, theirs = results.values()
  gap = np.abs(ours['prefill'] - theirs['prefill']).max()
  same = (ours['whole'] == theirs['whole']).mean()
  print(
    f'{len(prompts)} prompts: logits differ by at most {gap:.0e}; '
    f'{same:.0%} of the decoded tokens are the same'
  )
  if not gap < 1e-3:
    raise RuntimeError(
      f'the two models differ by {gap} in a logit: the ratio would compare two '
      'different models'
    )
  medians = {}
  for name, by_phase in seconds.items():
    prefill, whole = (statistics.median(by_phase[p][1:]) for p in PHASES)
    medians[name] = Seconds(
      first={phase: by_phase[phase][0] for phase in PHASES},
      prefill=prefill,
      decode=whole - prefill,
    )
  return medians


def main(argv: list[str]) -> None:
  """Prints the table, then the lowest ratios."""
  del argv
  family, model, params = load()
  tokens = _TOKENS.value
  with tempfile.TemporaryDirectory() as home:
    folder = pathlib.Path(home) / 'model'
    hf.export(folder, family, params, model, NO_WORDS)
    sides = {
      'gr2_jax': our_side(model, params, tokens),
      'transformers': their_side(folder, tokens),
    }
  rng = np.random.default_rng(0)
  rows, ratios = [], {'prefill': [], 'decode': []}
  for batch in map(int, _BATCHES.value):
    shape = (batch, _PROMPT.value)
    prompts = rng.integers(0, model.vocab_size, shape).astype(np.int32)
    ours, theirs = measure(sides, prompts, _ROUNDS.value).values()
    for phase, count in (
      ('prefill', prompts.size),
      ('decode', batch * (tokens - 1)),
    ):
      ours_s, theirs_s = getattr(ours, phase), getattr(theirs, phase)
      ratios[phase].append(theirs_s / ours_s)
      rows.append(
        {
          'prompts': batch,
          'phase': phase,
          'gr2_jax': f'{count / ours_s:.1f}',
          'transformers': f'{count / theirs_s:.1f}',
          'ratio': f'{theirs_s / ours_s:.2f}',
        }
      )
    print(
      f'first calls, compilation included: gr2_jax '
      f'{sum(ours.first.values()):.1f} s, transformers '
      f'{sum(theirs.first.values()):.1f} s'
    )
  print(reporting.table(rows, tuple(rows[0])))
  print(
    f'tokens/s, medians of {_ROUNDS.value} rounds; prompts of {_PROMPT.value} '
    f'tokens, {tokens} decoded; {torch.get_num_threads()} threads, '
    f'{bench.machine()}'
  )
  for phase, by_batch in ratios.items():
    print(f'ratio {phase}: {min(by_batch):.2f}')


if __name__ == '__main__':
  app.run(main)
