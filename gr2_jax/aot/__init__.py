"""Compiles a training step for hardware that is not here."""
