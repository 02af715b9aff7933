"""A process of a cluster: `gr2_jax.main` up to stage `rl`."""

from absl import app

from gr2_jax import main
from gr2_jax.pipeline import artifacts, flags


def run(config, root):
  """Replaces `main.run`, which would also evaluate."""
  with artifacts.lock(root):
    artifacts.run_stage(config, 'rl', root, 0)


if __name__ == '__main__':
  main.run = run
  app.run(main.main, flags_parser=flags.parse)
