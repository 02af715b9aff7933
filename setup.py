"""Packages; everything else is in setup.cfg.

The config files, which lie at the top of a checkout, are installed as
`gr2_jax.configs`, since a package `configs` could be anyone's.
"""

import setuptools

setuptools.setup(
  packages=[*setuptools.find_packages(include=['gr2_jax*']), 'gr2_jax.configs'],
  package_dir={'gr2_jax.configs': 'configs'},
)
