"""Starts `gr2_jax.main` on many hosts; see README.md beside this file."""
