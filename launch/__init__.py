"""Starts `gr2_jax.main` on many hosts; README.md describes each launcher."""
