"""A policy assembled from finished artifacts: tokens, shapes, parameters."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.data.log import Catalog
from gr2_jax.distributed import sharding
from gr2_jax.models import lora, transformer
from gr2_jax.pipeline import artifacts, checkpoint, graph, options
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling
from gr2_jax.prompts import bins as bins_lib
from gr2_jax.prompts import chat, compressed, prompt, vocabulary
from gr2_jax.prompts import context as context_lib
from gr2_jax.semantic_ids import ids

BINS = 'evidence_bins.json'
PARAMS = 'params'

# Stages that train the language model and leave a policy that ranks.
TRAINERS = tuple(
  name
  for name, stage in graph.STAGES.items()
  if stage.together and name != 'compress'
)


@dataclasses.dataclass(frozen=True)
class PolicySpec:
  """Everything about a policy but its parameters and devices."""

  catalog: Catalog | None  # None where no data set is read
  prompter: prompt.Prompter
  model: transformer.TransformerConfig
  adapters: lora.Adapters

  @property
  def vocabulary(self) -> vocabulary.Vocabulary:
    """The prompter's vocabulary."""
    return self.prompter.vocabulary

  @property
  def grammar(self) -> grammar_lib.Ranking:
    """The grammar of an answer to the prompter's slates."""
    words = self.vocabulary
    return grammar_lib.Ranking(
      slot_base=words.slot_base,
      num_slots=words.layout.num_slots,
      num_candidates=self.prompter.num_candidates,
      think_end=words.control['</think>'],
      eos=words.eos,
      pad=words.pad,
    )

  def with_context(self, context: str, written: int = 0) -> 'PolicySpec':
    """The same policy, reading another form of the context.

    With the form `text`, `written` is the length in tokens of the longest
    context that the compressor wrote.
    """
    prompter = dataclasses.replace(
      self.prompter, context=context_lib.parse(context), written=written
    )
    return dataclasses.replace(self, prompter=prompter)

  def abstract_params(self, mesh: Mesh) -> Any:
    """Shapes and shardings of the unboxed parameters."""
    boxed = jax.eval_shape(
      lambda key: transformer.init_params(self.model, key), jax.random.key(0)
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      sharding.unbox(boxed),
      sharding.param_shardings(mesh, boxed),
    )

  def load_params(self, artifact: os.PathLike[str] | str, mesh: Mesh) -> Any:
    """Loads the parameters of a finished stage's folder onto a mesh."""
    path = pathlib.Path(artifact)
    if (path / PARAMS).is_dir():
      path = path / PARAMS
    return checkpoint.load_params(path, self.abstract_params(mesh))

  def sampling(
    self, group: int, thinking: bool, temperature: float, constrained: bool
  ) -> sampling.SamplingOptions:
    """Sampling options whose budget is the most that the grammar needs."""
    p = self.prompter
    return sampling.SamplingOptions(
      group=group,
      max_tokens=p.thinking_tokens if thinking else p.answer_tokens,
      temperature=temperature,
      thinking=thinking,
      constrained=constrained,
    )


class Form(NamedTuple):
  """How a stage changed the policy that its config describes."""

  context: str = 'full'  # the form of the context it reads, `context.parse`
  layers: int = 0  # layers left in the model; 0: all


@dataclasses.dataclass(frozen=True)
class Policy:
  """A policy with its parameters."""

  spec: PolicySpec
  params: Any  # unboxed, on the mesh
  mesh: Mesh


def restore(
  artifact: os.PathLike[str] | str,
  mesh_config: options.Config,
  same_as: dict[str, pathlib.Path] | None = None,
) -> Policy:
  """Restores a finished policy of any shape from its stage's folder.

  The artifact, of one of TRAINERS, lies beside those it was made from. With
  `same_as`, artifacts of another policy, it must have been made from the same
  slates and semantic IDs.

  Raises:
    ArtifactError: the artifact is missing, unfinished, or made from other
      slates or semantic IDs.
  """
  path = pathlib.Path(artifact)
  run = artifacts.read_run(path)
  if run['stage'] not in TRAINERS:
    raise artifacts.ArtifactError(
      f'{path}: a run of {run["stage"]!r}, which leaves no policy; give the '
      f'folder of {", ".join(TRAINERS)}'
    )
  for name in ('slates', 'tokenizer'):
    if same_as and run['inputs'].get(name) != same_as[name].name:
      raise artifacts.ArtifactError(
        f'{path}: was made from {run["inputs"].get(name)}, this run from '
        f'{same_as[name].name}: train the teacher with the same sections data '
        'and tokenizer'
      )
  inputs = {
    name: path.parent / folder for name, folder in run['inputs'].items()
  }
  config = ml_collections.ConfigDict(run['config'])
  spec = load(config, inputs, *form_of(path))
  mesh = sharding.make_mesh(**mesh_config)
  return Policy(spec, spec.load_params(path, mesh), mesh)


def form_of(artifact: os.PathLike[str] | str, own_slates: bool = True) -> Form:
  """Reads how a finished stage changed the policy of its config.

  Raises:
    ArtifactError: the slates to rank are not the policy's own, and it reads
      contexts of the compressor, which has written none for other slates.
  """
  run = artifacts.read_run(pathlib.Path(artifact))
  section = run['config'][run['stage']]
  form = Form(section.get('context', 'full'), section.get('layers', 0))
  if not own_slates and context_lib.parse(form.context).text:
    raise artifacts.ArtifactError(
      f'{artifact}: this policy reads contexts that the compressor wrote, and '
      'there are none for slates from outside; use a policy that reads whole '
      'contexts or memory tokens'
    )
  return form


def load(
  config: options.Config,
  inputs: dict[str, pathlib.Path],
  context: str = 'full',
  layers: int = 0,
) -> PolicySpec:
  """Reads a data set, its semantic IDs and a vocabulary.

  Args:
    config: sections `prompt` and `model`.
    inputs: artifacts of slates, tokenizer and backbone, where vocabulary and
      BINS lie; of compress, where the policy reads its contexts.
    context: the form of the context, of `context.parse`.
    layers: layers left in the model; 0: all.
  """
  slates, home = inputs['slates'], inputs['backbone']
  catalog = slates_lib.read_catalog(slates)
  sids = ids.load(inputs['tokenizer'])
  bins = bins_lib.load(home / BINS)
  words = vocabulary.Vocabulary(
    vocabulary.find(home), layout_of(config.prompt, sids)
  )
  knowledge = chat.KNOWLEDGE if config.prompt.knowledge else ''
  spec = build(
    config,
    words,
    num_candidates=slates_lib.read_meta(slates)['candidates'],
    catalog=catalog,
    bins=bins,
    items=prompt.item_tokens(
      words, catalog, sids.codes, config.prompt.title_tokens
    ),
    turns=chat.turns(words, f'{config.prompt.system}\n\n{knowledge}'.strip()),
    layers=layers,
  )
  written = 0
  if context_lib.parse(context).text:
    written = artifacts.read_results(inputs['compress'])['longest']
  return spec.with_context(context, written)


def load_with_mesh(
  config: options.Config,
  inputs: dict[str, pathlib.Path],
  context: str = 'full',
  layers: int = 0,
) -> tuple[PolicySpec, Mesh]:
  """Reads the spec by `load`, and makes the mesh of section `mesh`."""
  spec = load(config, inputs, context, layers)
  return spec, sharding.make_mesh(**config.mesh)


def build(
  config: options.Config,
  words: Any,
  *,
  num_candidates: int,
  catalog: Catalog | None = None,
  bins: Any = None,
  items: dict[str, Any] | None = None,
  turns: Any = None,
  layers: int = 0,
) -> PolicySpec:
  """Builds a spec from a config and a vocabulary; the data may be missing.

  Without `catalog`, `bins`, `items` (of `prompt.item_tokens`) and `turns` (of
  `chat.turns`) the spec has the shapes of a policy, but renders no prompt.

  Args:
    config: sections `prompt` and `model`.
    words: a `vocabulary.Vocabulary`, or an object with its length, `layout`,
      `control`, the bases of its symbols, `first_symbol`, `eos` and `pad`.
    num_candidates: K, of the longest slate.
    catalog: the items.
    bins: the fitted evidence bins.
    items: field -> tokens of each item.
    turns: the fixed parts of a prompt.
    layers: layers left in the model; 0: all.
  """
  prompter = prompt.Prompter(
    vocabulary=words,
    bins=bins,
    items=items or {},
    opening=turns.opening if turns else (),
    closing=turns.closing if turns else (),
    asks=turns.asks if turns else {},
    layout=tuple(config.prompt.layout),
    fields=tuple(config.prompt.fields),
    history=config.prompt.history,
    history_fields=tuple(config.prompt.history_fields),
    num_candidates=num_candidates,
    reasoning=config.prompt.reasoning_tokens,
    budget=config.prompt.budget,
  )
  shape = config.model.to_dict()
  shape['num_layers'] = layers or shape['num_layers']
  del shape['source'], shape['new_rows']  # Only `backbone` reads these.
  adapters = lora.Adapters(
    rank=shape.pop('lora_rank'),
    targets=tuple(shape.pop('lora_targets')),
    first_row=words.first_symbol,
  )
  model = transformer.TransformerConfig(
    vocab_size=len(words),
    memory_base=words.memory_base,
    num_memory=words.layout.num_memory,
    **shape,
  )
  return PolicySpec(catalog, prompter, model, adapters)


def source(
  inputs: dict[str, pathlib.Path], split: str, context: str = 'full'
) -> Any:
  """A split's slates by random access.

  With the context `text` each slate is joined with the context that the
  compressor wrote for it.
  """
  slates = slates_lib.SlateSource(inputs['slates'], split)
  if not context_lib.parse(context).text:
    return slates
  written = records.Records(compressed.file(inputs['compress'], split))
  return compressed.Joined(slates, written)


def create_vocabulary(
  config: options.Config,
  slates: pathlib.Path,
  tokenizer: pathlib.Path,
  home: pathlib.Path,
  phrases: tuple[str, ...],
  backbone: Any = None,
) -> None:
  """Creates the vocabulary and fits the evidence bins.

  The vocabulary is trained on the catalog's text, or extends that of a
  pretrained model by this project's symbols.

  Args:
    config: section `prompt`.
    slates: artifact of that stage.
    tokenizer: artifact of that stage.
    home: folder that gets the vocabulary and BINS.
    phrases: text beside the catalog's; each of its words becomes one token, as
      do the words of category names.
    backbone: an `hf.Backbone`, or None.

  Raises:
    ValueError: a slate has more candidates than there are slots.
  """
  meta = slates_lib.read_meta(slates)
  if meta['candidates'] > config.prompt.num_slots:
    raise ValueError(
      f'prompt.num_slots={config.prompt.num_slots} is less than the '
      f'{meta["candidates"]} candidates of a slate (data.candidates): raise it'
    )
  catalog = slates_lib.read_catalog(slates)
  train = slates_lib.read(slates, 'train')
  bins = bins_lib.EvidenceBins.fit(
    train, meta['evidence'], tuple(config.prompt.evidence), config.prompt.bins
  )
  layout = layout_of(config.prompt, ids.load(tokenizer))
  if backbone:
    vocabulary.extend(
      home / vocabulary.EXTENDED,
      backbone.tokenizer_json,
      backbone.vocab_size,
      layout,
      source=str(backbone.source),
      bos_token=backbone.bos_token,
      eos_token=backbone.eos_token,
      chat_template=backbone.chat_template,
    )
  else:
    paths = [' > '.join(path) for path in catalog.categories]
    names = (name for path in catalog.categories for name in path)
    vocabulary.train(
      home / vocabulary.TRAINED,
      [*catalog.titles, *paths],
      layout,
      config.prompt.text_tokens,
      words={word for text in (*phrases, *names) for word in text.split()},
    )
  bins_lib.save(home / BINS, bins)  # Last: it marks both as finished.


def layout_of(config: options.Config, sids: Any) -> vocabulary.Layout:
  """The symbols of section `prompt` and of semantic IDs (levels, codebook)."""
  return vocabulary.Layout(
    evidence=tuple(config.evidence),
    bins=config.bins,
    num_slots=config.num_slots,
    num_memory=config.num_memory,
    levels=sids.levels,
    codebook_size=sids.codebook_size,
  )
