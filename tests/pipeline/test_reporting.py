import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from gr2_jax.pipeline import reporting


def _steps(directory):
  return [
    json.loads(line)['step']
    for line in (directory / 'metrics.jsonl').read_text().splitlines()
  ]


def test_metrics_are_lines_and_tensorboard_events(tmp_path):
  with reporting.MetricsWriter(tmp_path) as writer:
    writer.write(1, {'loss': jnp.float32(0.5), 'n': 3})
    writer.write(2, {'loss': float('nan')})
    assert _steps(tmp_path) == [1, 2]  # On disk before the close.
  assert reporting.read_metrics(tmp_path / 'metrics.jsonl') == [
    {'step': 1, 'loss': 0.5, 'n': 3.0},
    {'step': 2, 'loss': None},
  ]
  assert list((tmp_path / 'tensorboard').glob('events.out.tfevents.*'))


def test_a_resumed_writer_drops_later_lines_and_a_torn_one(tmp_path):
  with reporting.MetricsWriter(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': step})
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 4, "lo')
  assert len(reporting.read_metrics(tmp_path / 'metrics.jsonl')) == 3
  with reporting.MetricsWriter(tmp_path, resume_step=2) as writer:
    assert _steps(tmp_path) == [1, 2]
    writer.write(3, {'loss': 30})
  assert _steps(tmp_path) == [1, 2, 3]
  with reporting.MetricsWriter(tmp_path):
    assert _steps(tmp_path) == []


def test_a_damaged_line_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl:2: .*rubbish'):
    reporting.read_metrics(path)


def test_progress_off_a_terminal_is_lines(monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(sys, 'stderr', stream)
  monkeypatch.setattr(reporting, '_LINE_INTERVAL', 0.0)
  monkeypatch.setenv('TQDM_DISABLE', '')
  with reporting.progress(10, 'sft', initial=4) as bar:
    bar.update(2)
    bar.update(4)
  lines = stream.getvalue().splitlines()
  assert '\r' not in stream.getvalue()
  assert 'sft' in lines[0]
  assert '4/10' in lines[0]
  assert '10/10' in lines[-1]
  assert 'step/s' in lines[-1] or 's/step' in lines[-1]


def test_non_finite_values_name_metric_and_step():
  reporting.check_finite(3, {'loss': 1.0, 'norms': np.ones(3)})
  with pytest.raises(FloatingPointError, match='loss is nan at step 7'):
    reporting.check_finite(7, {'loss': jnp.nan})
  with pytest.raises(FloatingPointError, match='norms .*step 8'):
    reporting.check_finite(8, {'norms': np.array([1.0, np.inf])})


def test_a_table_is_aligned():
  rows = [{'method': 'incoming', 'r@1': 0.25}, {'method': 'policy', 'n': 3}]
  assert reporting.table(rows, ['method', 'r@1', 'n']).splitlines() == [
    '| method   |    r@1 |   n |',
    '| -------- | -----: | --: |',
    '| incoming | 0.2500 |   - |',
    '| policy   |      - |   3 |',
  ]
