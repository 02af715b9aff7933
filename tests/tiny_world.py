"""All artifacts of a world of sixty items, and what a stage left behind."""

import pathlib

import jax

from configs import common
from gr2_jax.distributed import sharding
from gr2_jax.pipeline import artifacts, checkpoint
from gr2_jax.policy import policy
from gr2_jax.train import learner

from . import tiny

SIZES = {
  'data.world.n_items': 60,
  'data.world.n_users': 40,
  'data.world.clusters': 4,
  'data.world.visits': 3,
  'data.world.organic': 8,
  'data.candidates': 5,
  'data.history': 6,
  'tokenizer.levels': 3,
  'tokenizer.codebook_size': 8,
  'tokenizer.text_dim': 16,
  'tokenizer.latent': 8,
  'tokenizer.hidden': (16,),
  'tokenizer.pretrain_steps': 5,
  'tokenizer.steps': 5,
  'tokenizer.batch_size': 32,
  'prompt.history': 2,
  'prompt.evidence': ('incoming_rank', 'popularity:raw'),
  'prompt.bins': 4,
  'prompt.num_slots': 6,
  'prompt.num_memory': 4,
  'prompt.text_tokens': 40,
  'prompt.reasoning_tokens': 6,
  'model.d_model': 16,
  'model.num_layers': 1,
  'model.num_heads': 2,
  'model.num_kv_heads': 2,
  'model.head_dim': 8,
  'model.d_ff': 24,
  'midtrain.batch_size': 8,
  'midtrain.sequence_items': 3,
  'midtrain.rows': 8,
  'midtrain.row_tokens': 128,
  'midtrain.retrieval_histories': 16,
  'midtrain.beams': 10,
  'midtrain.pointers': 2,
  'sft.batch_size': 8,
  'sft.eval_slates': 8,
  'sft.eval_batch_size': 8,
  'opd.batch_size': 8,
  'opd.refill_size': 8,
  'opd.eval_slates': 8,
  'opd.eval_batch_size': 8,
  'rl.batch_size': 8,
  'rl.group_size': 4,
  'rl.eval_slates': 8,
  'rl.eval_batch_size': 8,
  'compress.ratio': 0.6,
  'compress.ratios': (0.45, 0.6),
  'compress.batch_size': 8,
  'compress.eval_slates': 8,
  'compress.eval_batch_size': 8,
  'compress.train_slates': 12,
  'compress.imitate.steps': 4,
  'compress.imitate.eval_every': 2,
} | {
  f'{stage}.{name}': value
  for stage in ('midtrain', 'sft', 'opd', 'rl', 'compress')
  for name, value in (('steps', 6), ('eval_every', 2), ('warmup', 1))
}  # fmt: skip
OVERRIDES = [
  f'--config.{name}={value!r}' if isinstance(value, tuple)
  else f'--config.{name}={value}'
  for name, value in SIZES.items()
]  # fmt: skip
MAKE_MESH = sharding.make_mesh
NEEDS = {
  'backbone': ('slates', 'tokenizer'),
  'midtrain': ('slates', 'tokenizer', 'backbone'),
  'traces': ('slates', 'tokenizer', 'backbone'),
  'sft': ('slates', 'tokenizer', 'backbone', 'midtrain', 'traces'),
  'rl': ('slates', 'tokenizer', 'backbone', 'sft'),
}


def config(**changes):
  """The config of the world; keywords have `__` where fields have a dot."""
  own = common.compose('rl', 'test,dataset=world')
  own.update_from_flattened_dict(SIZES)
  own.update_from_flattened_dict(
    {name.replace('__', '.'): value for name, value in changes.items()}
  )
  return own.lock()


def build(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Runs everything that RL needs, and RL; stage -> its directory."""
  own = config()
  with artifacts.lock(root):
    artifacts.run_stage(own, 'rl', root, 0, log=lambda _: None)
  return folders(root)


def folders(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Stage -> its directory, of a workdir with one run of each."""
  return {
    path.name.partition('-')[0]: path
    for path in root.iterdir()
    if path.is_dir()
  }


def finish(directory, stage):
  """Makes a folder with parameters look like that stage's artifact."""
  run = {'stage': stage, 'seed': 0, 'config': {stage: {}}, 'inputs': {}}
  (directory / 'config.json').write_text(artifacts.dumps(run))
  (directory / 'results.json').write_text('{}')


def inputs(world, stage):
  return {name: world[name] for name in NEEDS[stage]}


def spec(world, own=None) -> policy.PolicySpec:
  return policy.load(own or config(), world)


def mesh(own=None) -> jax.sharding.Mesh:
  return sharding.make_mesh(**(own or config()).mesh)


def source(world, split):
  return policy.source(world, split)


def on_one_device(patch):
  """Makes a mesh whose size is left open one of a single device."""

  def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    if (data, fsdp, tensor, devices) == (-1, 1, 1, None):
      return tiny.one_device()
    return MAKE_MESH(data, fsdp, tensor, devices)

  patch.setattr(sharding, 'make_mesh', make_mesh)


def on_all_devices(patch):
  """Makes a mesh whose size is left open one of all devices, as in a run."""
  patch.setattr(sharding, 'make_mesh', MAKE_MESH)


def left(world, stage, workdir, own=None):
  """What a finished run has: chosen parameters and its last state, on host."""
  own = own or config()
  here, devices = spec(world, own), mesh(own)
  optimizer = learner.make_optimizer(
    learner.OptimizerOptions.from_config(own[stage])
  )
  with sharding.activate(devices):
    state, _ = learner.init_state(
      here.model, optimizer, jax.random.key(0), devices
    )
    if here.adapters.rank:
      start = here.adapters.start(state.params, jax.random.key(0))
      state = learner.TrainState(state.step, start, optimizer.init(start))
  with checkpoint.Checkpointer(workdir / 'checkpoints') as saved:
    state, step, meta = saved.restore(state)
  params = here.load_params(workdir, devices)
  return jax.device_get({'params': params, 'state': state}), step, meta
