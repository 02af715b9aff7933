import json
import pathlib
import re

import nbclient
import nbformat
import pytest

from gr2_jax.stages import evaluate

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).parent.parent
_TOUR = _ROOT / 'colab' / 'tour.ipynb'

# Less than the test preset: the tour is about running, not about learning.
_SMALLER = """
config.data.world.n_users = 120
config.data.max_slates_train = 4
config.data.max_slates_eval = 3
config.tokenizer.levels = 3
config.tokenizer.pretrain_steps = config.tokenizer.steps = 20
config.model.num_layers = 1
for section in (config.midtrain, config.sft, config.rl):
  section.steps = section.eval_every = 2
config.midtrain.mixture.sequence = config.midtrain.mixture.caption = 0.0
config.baselines.seeds = 1
config.baselines.legacy.steps = 20
config.baselines.gbdt.rounds = 5
config.baselines.gbdt.threads = 1
"""

# What the tour has left in the kernel.
_FOUND = """
import json

found = {'ranking': ranking, 'presented': presented}
found = {name: value.tolist() for name, value in found.items()}
print(json.dumps(found | {'titles': titles}))
"""


def _read():
  return nbformat.read(_TOUR, as_version=4)


def _shown(cell):
  """What a cell has printed and displayed, in order."""
  texts = []
  for output in cell.outputs:
    if output.output_type == 'stream' and output.name == 'stdout':
      texts.append(output.text)
    elif output.output_type == 'display_data':
      texts.append(output.data.get('text/markdown', '') + '\n')
  return ''.join(texts)


def _rows(text):
  """The cells of the Markdown tables in a text, headers and rules too."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  return [[c.strip() for c in line.strip('|').split('|')] for line in lines]


@pytest.fixture
def quiet_jupyter(tmp_path, monkeypatch):
  """Jupyter leaves nothing in the home folder, and finds nothing there."""
  for name in ('IPYTHONDIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR'):
    monkeypatch.setenv(name, str(tmp_path / name.lower()))


@pytest.mark.usefixtures('quiet_jupyter')
def test_the_tour_runs_from_logs_to_the_table(tmp_path, monkeypatch):
  # The notebook, as if started in the colab/ of a repository of its own.
  for name in ('configs', 'gr2_jax'):
    (tmp_path / name).symlink_to(_ROOT / name)
  (tmp_path / 'colab').mkdir()
  monkeypatch.setenv('GR2_TOUR_PRESET', 'dataset=world,test')
  # Most of the time goes into compiling; slower programs do here.
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  notebook = _read()
  cells = notebook.cells
  place = [cell.id for cell in cells].index('parameters')
  cells.insert(place + 1, nbformat.v4.new_code_cell(_SMALLER, id='smaller'))
  cells.append(nbformat.v4.new_code_cell(_FOUND, id='found'))
  nbclient.NotebookClient(
    notebook,
    kernel_name='python3',
    timeout=None,
    resources={'metadata': {'path': str(tmp_path / 'colab')}},
  ).execute()
  tour = {cell.id: cell for cell in cells}
  found = json.loads(_shown(tour['found']))
  ranking, titles = found['ranking'], found['titles']

  # To the end, and all of it in the repository's runs/.
  code = [cell for cell in cells if cell.cell_type == 'code']
  assert all(cell.execution_count for cell in code)
  assert len(list(tmp_path.glob('runs/evaluate-*/results.json'))) == 1

  # A prompt and its answer, which name the same slots.
  prompt = _shown(tour['prompt'])
  assert re.findall(r'<slot(\d+)>\n', prompt) == [str(k) for k in range(10)]
  reasoning, answer = _shown(tour['answer']).split('</think>')
  assert reasoning.startswith('<think>')
  slots = [int(slot) for slot in re.findall(r'<slot(\d+)>', answer)]
  assert [found['presented'][slot] for slot in slots] == ranking

  # The slate before and after is a permutation, grades and all.
  assert sorted(ranking) == list(range(10))
  _, _, *rows = _rows(_shown(tour['before-after']))
  assert [row[0] for row in rows] == titles
  assert [row[2] for row in rows] == [titles[rank] for rank in ranking]
  grades = [row[1] for row in rows]
  assert [row[3] for row in rows] == [grades[rank] for rank in ranking]

  # The table has every ranker and every gain with its interval.
  _, _, *rows = _rows(_shown(tour['results']))
  # ... but what a pretrained model starts as, and what RL did not start from.
  absent = ('policy_start', 'policy_opd', 'policy_midtrain')
  rankers = [name for name in evaluate.RANKERS if not name.startswith(absent)]
  pairs = [p for p in evaluate.PAIRS if not any(a in p for a in absent)]
  last = len(rankers)
  assert [row[0] for row in rows[:last]] == rankers
  gains = {row[0]: row[1] for row in rows[last + 2 :]}
  assert list(gains) == [f'{one}-{other}' for one, other in pairs]
  for gain in gains.values():
    assert re.fullmatch(r'[+-]\d\.\d+ \[[+-]\d\.\d+, [+-]\d\.\d+\]', gain)


def test_the_tour_is_committed_without_the_traces_of_a_run():
  notebook = _read()
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  for cell in notebook.cells:
    assert cell.metadata == {}
    if cell.cell_type == 'code':
      assert cell.outputs == []
      assert cell.execution_count is None


def test_the_tour_names_no_place_of_a_machine():
  text = _TOUR.read_text(encoding='utf-8')
  assert not re.findall(r"""(?:^|[\s'"`(=])(?:/\w|~/|[A-Z]:\\)""", text)
