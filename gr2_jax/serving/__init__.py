"""Serving: a finished policy that answers slates, in bulk or over HTTP."""

from gr2_jax.serving.reranker import Reranker

__all__ = ['Reranker']
