"""Alias: `python -m gr2_jax.serve` is `python -m gr2_jax.serving`."""

from absl import app

from gr2_jax.serving import command

if __name__ == '__main__':
  app.run(command.main)
