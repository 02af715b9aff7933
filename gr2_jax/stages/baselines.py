"""Baselines: scores of validation and test by rankers that read no language.

  incoming  the incoming order; every gain is measured against it
  random    a seeded shuffle
  best      by true utility where it is known, else by the labels: the ceiling
  legacy    a pointwise click model, see baselines/click_model.py
  gbdt      gradient-boosted trees on the evidence, see baselines/gbdt.py

A resumed run reads `<name>-<seed>/scores.npz` of each trained ranker, and
continues the click model, bit for bit, from its last validation.

Axes: S seeds, K candidates, n slates of a split.
"""

import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from gr2_jax.baselines import click_model, gbdt
from gr2_jax.data import files
from gr2_jax.data import slates as slates_lib
from gr2_jax.ops import metrics
from gr2_jax.pipeline import checkpoint, loop

SPLITS = ('validation', 'test')

Splits = Mapping[str, slates_lib.Slates]


def run(
  config: ConfigDict, inputs: dict[str, pathlib.Path], workdir: pathlib.Path
) -> dict[str, Any]:
  """Trains the rankers and scores validation and test.

  Writes `<split>/scores.npz`, see `read_scores`. Only `best` reads the labels
  of test, and no metric is computed there.

  Returns:
    `validation`: metrics as means over slates and seeds; and for each seed the
    `rounds` of gbdt and the `steps` of the click model selected by validation.

  Raises:
    ValueError: baselines.seeds is below 1.
    ImportError: LightGBM is not installed.
    FloatingPointError: the click model diverged.
  """
  started = time.monotonic()
  stage = config.baselines
  if stage.seeds < 1:
    raise ValueError(f'baselines.seeds={stage.seeds}: must be at least 1')
  meta = slates_lib.read_meta(inputs['slates'])
  train = slates_lib.read(inputs['slates'], 'train')
  splits = {name: slates_lib.read(inputs['slates'], name) for name in SPLITS}

  # Train. The trees come first, so that a missing LightGBM fails at once.
  trained = {'gbdt': [], 'legacy': []}
  for name, fits in trained.items():
    for seed in range(stage.seeds):
      directory = workdir / f'{name}-{seed}'
      path = directory / 'scores.npz'
      if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        if name == 'gbdt':
          columns = tuple(meta['evidence'])
          fit = _fit_gbdt(stage.gbdt, train, splits, columns, seed)
        else:
          fit = _fit_click_model(
            stage.legacy, train, splits, meta['items'], seed, directory
          )
        _write_npz(path, fit)
      fits.append(_read_npz(path))

  # Write and measure.
  scores = {}
  for number, (split, slates) in enumerate(splits.items()):
    scores[split] = _fixed_scores(slates, [stage.random_seed, number]) | {
      name: np.stack([fit[split] for fit in fits])
      for name, fits in trained.items()
    }
    (workdir / split).mkdir(exist_ok=True)
    _write_npz(workdir / split / 'scores.npz', scores[split])
  held_out = splits['validation']
  return {
    'validation': {
      name: {
        metric: float(value.mean())
        for metric, value in _measure(values, held_out).items()
      }
      for name, values in scores['validation'].items()
    },
    'rounds': [int(fit['rounds']) for fit in trained['gbdt']],
    'steps': [int(fit['steps']) for fit in trained['legacy']],
    'seconds': time.monotonic() - started,
  }


def read_scores(
  directory: os.PathLike[str] | str, split: str
) -> dict[str, np.ndarray]:
  """Reads a finished stage's scores of a split: baseline -> float32.

  `incoming`, `random` and `best` are [n, K]; `legacy` and `gbdt` [S, n, K].
  Larger is better; -inf at padding.
  """
  return _read_npz(pathlib.Path(directory) / split / 'scores.npz')


def rankings(scores: np.ndarray, count: np.ndarray) -> np.ndarray:
  """Sorts candidates by falling score [..., K]: int32, one for each rank.

  Ties keep the incoming order, and padding comes last. The axes of `count` are
  the last ones of [...], so that seeds share the counts of slates. Raises a
  ValueError if a real candidate's score is NaN, or the shapes do not fit.
  """
  scores, count = np.asarray(scores, np.float64), np.asarray(count)
  leading = scores.shape[:-1]
  if count.shape != leading[len(leading) - count.ndim :]:
    raise ValueError(
      f'count has shape {count.shape}, which is not the end of {leading}, the '
      'axes of the scores before the candidates'
    )
  real = np.arange(scores.shape[-1]) < count[..., None]
  real = np.broadcast_to(real, scores.shape)
  if np.isnan(scores[real]).any():
    raise ValueError(
      f'{np.isnan(scores[real]).sum()} scores of real candidates are NaN'
    )
  # Padding is a separate key, because a real candidate may score -inf.
  falling = np.where(real, -scores, 0.0)
  return np.lexsort((falling, ~real), axis=-1).astype(np.int32)


def _fixed_scores(
  slates: slates_lib.Slates, seed: list[int]
) -> dict[str, np.ndarray]:
  """Scores that need no training: incoming, random and best."""
  real = slates.candidates >= 0
  known = (np.isfinite(slates.utility) | ~real).all(axis=1, keepdims=True)
  scores = {
    'incoming': -np.broadcast_to(np.arange(real.shape[1]), real.shape),
    'random': np.random.default_rng(seed).random(real.shape),
    'best': np.where(known, slates.utility, slates.grades),
  }
  return {
    name: np.where(real, values, -np.inf).astype(np.float32)
    for name, values in scores.items()
  }


def _measure(
  scores: np.ndarray, slates: slates_lib.Slates
) -> dict[str, jax.Array]:
  """Metrics [..., n] of scores [..., n, K]."""
  grades = np.broadcast_to(slates.grades, scores.shape)
  count = np.broadcast_to(slates.count, scores.shape[:-1])
  return metrics.ranking_metrics(rankings(scores, count), grades, count)


def _fit_gbdt(
  config: ConfigDict,
  train: slates_lib.Slates,
  splits: Splits,
  columns: tuple[str, ...],
  seed: int,
) -> dict[str, np.ndarray]:
  """Trains trees; returns scores by split, and `rounds`."""
  booster = gbdt.fit(config, train, splits['validation'], columns, seed)
  scores = {
    name: gbdt.score(booster, slates) for name, slates in splits.items()
  }
  return scores | {'rounds': np.int32(booster.best_iteration)}


def _fit_click_model(
  config: ConfigDict,
  train: slates_lib.Slates,
  splits: Splits,
  items: int,
  seed: int,
  directory: pathlib.Path,
) -> dict[str, np.ndarray]:
  """Trains the click model; returns scores by split, and `steps`.

  N@5 on validation selects the parameters and ends training.
  """
  held_out = splits['validation']
  scaler = click_model.fit_scaler(train)
  model = click_model.make_model(config, items)
  optimizer = click_model.make_optimizer(config)
  update = click_model.make_update(model, optimizer, seed)
  score = click_model.make_score(model)

  def batch_of(step: int) -> click_model.Batch:
    rows = click_model.batch_rows(len(train), config.batch_size, seed, step)
    return click_model.make_batch(train, rows, scaler)

  def take_step(saved: dict[str, Any], step: int):
    state, values = update(saved['state'], batch_of(step - 1))
    return saved | {'state': state}, values

  def evaluate(saved: dict[str, Any], step: int) -> loop.Evaluation:
    params = saved['state'].params
    measured = _measure(score(params, held_out, scaler), held_out)
    quality = float(measured['n@5'].mean())
    if quality > chosen['n@5']:
      saved = saved | {'best': params}
      chosen.update({'n@5': quality, 'step': step})
    return loop.Evaluation(saved, {'validation/n@5': quality})

  with checkpoint.Checkpointer(directory / 'checkpoints') as checkpoints:
    state = click_model.init(model, optimizer, batch_of(0), seed)
    saved = {'state': state, 'best': state.params}
    fresh = saved, 0, {'n@5': -1.0, 'step': 0}
    saved, done, chosen = checkpoints.restore(saved) or fresh
    saved = loop.run(
      f'click model {seed}',
      directory,
      checkpoints,
      state=saved,
      done=done,
      steps=config.steps,
      eval_every=config.eval_every,
      take_step=take_step,
      evaluate=evaluate,
      meta=lambda: chosen,
      stopped=lambda step: (
        step - chosen['step'] >= config.patience * config.eval_every
      ),
      log_every=config.eval_every,
    )
  scores = {
    name: score(saved['best'], slates, scaler)
    for name, slates in splits.items()
  }
  return scores | {'steps': np.int32(chosen['step'])}


def _write_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  with files.atomic_write(path, 'wb') as file:
    np.savez(file, **arrays)


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  with np.load(path) as file:
    return dict(file)
