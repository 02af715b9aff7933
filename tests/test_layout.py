"""The rooms of the package: imports go downhill, and nothing stands loose."""

import ast
import pathlib

import gr2_jax

# From the bottom up: a room may import from itself and the rooms before it.
ROOMS = (
  'ops',
  'distributed',
  'data',
  'prompts',
  'models',
  'hf',
  'pipeline',
  'semantic_ids',
  'baselines',
  'policy',
  'train',
  'teachers',
  'serving',
  'compressor',
  'aot',
  'stages',
  'studies',
  'bench',
)
LOOSE = {'__init__', 'main', 'serve'}
ROOT = pathlib.Path(gr2_jax.__file__).parent


def imported_rooms(path):
  """Rooms that a file imports from, wherever in it the import stands."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    else:
      continue
    for name in names:
      package, _, rest = name.partition('.')
      room = rest.partition('.')[0]
      if package == 'gr2_jax' and room and (ROOT / room).is_dir():
        yield room


def test_every_folder_is_a_room_and_has_its_place_in_the_order():
  rooms = {path.parent.name for path in ROOT.glob('*/*.py')}
  assert rooms == set(ROOMS)


def test_imports_go_downhill():
  height = {room: i for i, room in enumerate(ROOMS)}
  uphill = [
    f'{path.relative_to(ROOT)} imports {room}'
    for path in sorted(ROOT.glob('*/**/*.py'))
    for room in imported_rooms(path)
    if height[room] > height[path.relative_to(ROOT).parts[0]]
  ]
  assert not uphill


def test_operations_import_nothing_of_the_project():
  for path in (ROOT / 'ops').glob('*.py'):
    assert set(imported_rooms(path)) <= {'ops'}


def test_no_module_stands_loose():
  assert {path.stem for path in ROOT.glob('*.py')} == LOOSE


def test_every_room_says_what_it_is_for():
  for room in ROOMS:
    tree = ast.parse((ROOT / room / '__init__.py').read_text())
    assert ast.get_docstring(tree), room
