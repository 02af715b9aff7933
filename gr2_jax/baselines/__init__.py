"""Rankers that are not language models."""
