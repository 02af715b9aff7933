import numpy as np
import pytest

from gr2_jax import artifacts
from gr2_jax.data import records, teachers
from gr2_jax.data import slates as slates_lib
from gr2_jax.stages import traces

from .. import tiny_world


def run(world, workdir, **changes):
  config = tiny_world.config(
    **{f'traces__{name}': value for name, value in changes.items()}
  )
  results = traces.run(config, tiny_world.inputs(world, 'traces'), workdir)
  kept, lost = (
    records.Records(workdir / name)
    for name in (traces.ACCEPTED, traces.REJECTED)
  )
  return results, *([r[i] for i in range(len(r))] for r in (kept, lost))


def test_every_slate_is_kept_or_rejected_and_counted(world, tmp_path):
  results, kept, lost = run(world, tmp_path, noise=4.0, tries=2)
  slates = slates_lib.source(world['slates'], 'train')
  assert lost
  assert (results['traces'], results['rejected']) == (len(kept), len(lost))
  indices = sorted(int(r['slate']) for r in [*kept, *lost])
  assert indices == list(range(len(slates)))
  for record in kept:
    grades = slates[int(record['slate'])]['grades']
    assert grades[record['ranking'][0]] > 0
    assert record['verdict'] == teachers.VERDICTS.index('accepted')
  for record in lost:
    assert not slates[int(record['slate'])]['grades'][record['ranking'][0]] > 0
    assert record['tries'] == 2
  tries = [int(r['tries']) for r in [*kept, *lost]]
  np.testing.assert_allclose(results['tries'], np.mean(tries))
  first = sum(r['tries'] == 1 for r in kept)
  np.testing.assert_allclose(results['first_try'], first / len(slates))


def test_one_try_that_fails_is_no_first_try(world, tmp_path):
  results, kept, lost = run(world, tmp_path, noise=4.0, tries=1)
  assert lost
  np.testing.assert_allclose(
    results['first_try'], len(kept) / (len(kept) + len(lost))
  )


def test_targeted_traces_lose_no_slate(world, tmp_path):
  results, kept, lost = run(world, tmp_path, kind='targeted')
  assert len(kept) == len(slates_lib.source(world['slates'], 'train'))
  assert not lost
  assert results['first_try'] is None


def test_a_trace_is_a_function_of_seed_and_slate(world, tmp_path):
  run(world, tmp_path)
  for name in (traces.ACCEPTED, traces.REJECTED):
    found = (tmp_path / name).read_bytes()
    assert found == (world['traces'] / name).read_bytes()
  whole = artifacts.read_results(world['traces'])
  assert whole['traces'] == len(records.Records(tmp_path / traces.ACCEPTED))
  config = tiny_world.config()
  with config.unlocked():
    config.seed = 1
  traces.run(config, tiny_world.inputs(world, 'traces'), tmp_path)
  found = (tmp_path / traces.ACCEPTED).read_bytes()
  assert found != (world['traces'] / traces.ACCEPTED).read_bytes()


def test_an_unknown_kind_is_named(world, tmp_path):
  with pytest.raises(ValueError, match="traces.kind is 'target'.*rejection"):
    run(world, tmp_path, kind='target')
