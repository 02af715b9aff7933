"""Pretrained language models in, and out again.

`open_backbone` reads the metadata of a checkpoint, `import_params` its weights
straight onto a mesh, and `export` writes a folder that transformers and vLLM
load.
"""

from gr2_jax.hf.backbone import Backbone, open_backbone, token_ids
from gr2_jax.hf.exporting import export
from gr2_jax.hf.importing import import_params

__all__ = ['Backbone', 'export', 'import_params', 'open_backbone', 'token_ids']
