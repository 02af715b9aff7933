"""Stages on eight devices give what one device gives."""

import json

import numpy as np
import pytest

from gr2_jax.stages import rl, sft

from .. import tiny, tiny_world

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(('stage', 'run'), [('sft', sft.run), ('rl', rl.run)])
def test_a_stage_on_eight_devices_equals_one(
  world, tmp_path, monkeypatch, stage, run
):
  tiny_world.on_all_devices(monkeypatch)
  run(tiny_world.config(), tiny_world.inputs(world, stage), tmp_path)
  spec, mesh = tiny_world.spec(world), tiny.one_device()
  tiny.assert_trees_close(
    spec.load_params(tmp_path, mesh),
    spec.load_params(world[stage], mesh),
    2e-5,
  )
  losses = [
    [
      row['loss']
      for row in map(json.loads, (path / 'metrics.jsonl').open())
      if 'loss' in row
    ]
    for path in (tmp_path, world[stage])
  ]
  assert len(losses[0]) == 6
  np.testing.assert_allclose(*losses, atol=1e-4)
