"""A policy put together from finished artifacts: tokens, shapes, parameters."""

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple

import jax
import ml_collections

from gr2_jax.data import records
from gr2_jax.data import slates as slates_lib
from gr2_jax.data.log import Catalog
from gr2_jax.distributed import sharding
from gr2_jax.models import lora, transformer
from gr2_jax.pipeline import artifacts, checkpoint, graph
from gr2_jax.policy import grammar as grammar_lib
from gr2_jax.policy import sampling
from gr2_jax.prompts import bins as bins_lib
from gr2_jax.prompts import chat, compressed, prompt, vocabulary
from gr2_jax.prompts import context as context_lib
from gr2_jax.semantic_ids import ids

BINS = 'evidence_bins.json'
PARAMS = 'params'

# Stages that train the language model, and leave a policy that ranks.
TRAINERS = tuple(
  name
  for name, stage in graph.STAGES.items()
  if stage.together and name != 'compress'
)


@dataclasses.dataclass(frozen=True)
class Setup:
  """What every language-model stage shares."""

  catalog: Catalog
  prompter: prompt.Prompter
  grammar: grammar_lib.Ranking
  model: transformer.TransformerConfig
  mesh: jax.sharding.Mesh
  adapters: lora.Adapters
  slates: pathlib.Path | None = None  # artifact of that stage
  written: pathlib.Path | None = None  # of `compress`, whose contexts are read

  @property
  def vocabulary(self) -> vocabulary.Vocabulary:
    """Token ids."""
    return self.prompter.vocabulary

  def source(self, split: str) -> Any:
    """A split's slates by random access, as `batches.requests` wants them."""
    slates = slates_lib.source(self.slates, split)
    if not self.written:
      return slates
    written = records.Records(compressed.file(self.written, split))
    return compressed.Joined(slates, written)

  def reading(self, context: str) -> 'Setup':
    """The same, with prompts that have another form of the context.

    Args:
      context: of `context.parse`, but `text`.
    """
    prompter = dataclasses.replace(
      self.prompter, context=context_lib.parse(context)
    )
    return dataclasses.replace(self, prompter=prompter, written=None)

  def reading_written(self, home: pathlib.Path, longest: int) -> 'Setup':
    """The same, with the contexts that the compressor wrote.

    Args:
      home: artifact of `compress`.
      longest: tokens of the longest of them.
    """
    prompter = dataclasses.replace(
      self.prompter, context=context_lib.parse('text'), written=longest
    )
    return dataclasses.replace(self, prompter=prompter, written=home)

  def abstract_params(self) -> Any:
    """Shapes and shardings of the parameters, unboxed."""
    boxed = jax.eval_shape(
      lambda key: transformer.init_params(self.model, key), jax.random.key(0)
    )
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      sharding.unbox(boxed),
      sharding.param_shardings(self.mesh, boxed),
    )

  def load_params(self, artifact: os.PathLike[str] | str) -> Any:
    """Parameters of a finished stage's directory, on the mesh."""
    path = pathlib.Path(artifact)
    if (path / PARAMS).is_dir():
      path = path / PARAMS
    return checkpoint.load_params(path, self.abstract_params())

  def sampling(
    self, group: int, thinking: bool, temperature: float, constrained: bool
  ) -> sampling.SamplingConfig:
    """A sampler whose budget is what the grammar needs."""
    p = self.prompter
    return sampling.SamplingConfig(
      group=group,
      max_tokens=p.thinking_tokens if thinking else p.answer_tokens,
      temperature=temperature,
      thinking=thinking,
      constrained=constrained,
    )


class Form(NamedTuple):
  """What a stage made of the policy that its config describes."""

  context: str = 'full'  # that it reads, of `context.parse`
  layers: int = 0  # that are left of its model; 0: all


@dataclasses.dataclass(frozen=True)
class Policy:
  """A trained policy, at rest."""

  setup: Setup
  params: Any  # unboxed, on the setup's mesh


def restore(
  artifact: os.PathLike[str] | str,
  mesh,
  same_as: dict[str, pathlib.Path] | None = None,
) -> Policy:
  """A finished policy of any shape, from where its stage left it.

  Args:
    artifact: of one of TRAINERS; what it was made from lies beside it.
    mesh: section `mesh`, of whoever reads it.
    same_as: artifacts of another policy, whose slates and semantic IDs this
      one must have been made from.

  Raises:
    ArtifactError: there is no such artifact, it is not finished, or it is of
      other slates or semantic IDs.
  """
  path = pathlib.Path(artifact)
  found = artifacts.read_run(path)
  if found['stage'] not in TRAINERS:
    raise artifacts.ArtifactError(
      f'{path}: a run of {found["stage"]!r}, which leaves no policy; give the '
      f'folder of {", ".join(TRAINERS)}'
    )
  for name in ('slates', 'tokenizer') if same_as else ():
    if found['inputs'].get(name) != same_as[name].name:
      raise artifacts.ArtifactError(
        f'{path}: was made from {found["inputs"].get(name)}, this run from '
        f'{same_as[name].name}: train the teacher with the same sections data '
        'and tokenizer'
      )
  config = ml_collections.ConfigDict(found['config'])
  config.mesh = mesh
  inputs = {
    name: path.parent / folder for name, folder in found['inputs'].items()
  }
  setup = load(config, inputs, *form_of(path))
  return Policy(setup, setup.load_params(path))


def form_of(artifact: os.PathLike[str] | str, own: bool = True) -> Form:
  """What a finished stage made of the policy that its config describes.

  Args:
    artifact: of one of TRAINERS.
    own: whether the slates that it is to read are those it was trained beside,
      of which alone the compressor has written.

  Raises:
    ArtifactError: they are not, and it reads what the compressor writes.
  """
  found = artifacts.read_run(pathlib.Path(artifact))
  section = found['config'][found['stage']]
  form = Form(section.get('context', 'full'), section.get('layers', 0))
  if not own and context_lib.parse(form.context).text:
    raise artifacts.ArtifactError(
      f'{artifact}: this policy reads contexts that the compressor wrote, and '
      'it wrote none of slates from outside; take one that reads them whole, '
      'or through memory tokens'
    )
  return form


def load(
  config,
  inputs: dict[str, pathlib.Path],
  context: str = 'full',
  layers: int = 0,
) -> Setup:
  """Reads a data set, its semantic IDs and a vocabulary.

  Args:
    config: sections `prompt`, `model`, `mesh`.
    inputs: artifacts of slates, tokenizer and backbone, where vocabulary and
      BINS lie; of compress, where the context is what it wrote.
    context: of `context.parse`.
    layers: that are left of the model; 0: all.

  Returns:
    The setup.
  """
  slates, home = inputs['slates'], inputs['backbone']
  catalog = slates_lib.read_catalog(slates)
  sids = ids.load(inputs['tokenizer'])
  bins = bins_lib.load(home / BINS)
  words = vocabulary.Vocabulary(
    vocabulary.find(home), _layout(config.prompt, sids)
  )
  known = chat.KNOWLEDGE if config.prompt.knowledge else ''
  turns = chat.turns(words, f'{config.prompt.system}\n\n{known}'.strip())
  prompter = prompt.Prompter(
    vocabulary=words,
    bins=bins,
    items=prompt.item_tokens(
      words, catalog, sids.codes, config.prompt.title_tokens
    ),
    opening=turns.opening,
    closing=turns.closing,
    asks=turns.asks,
    layout=tuple(config.prompt.layout),
    fields=tuple(config.prompt.fields),
    history=config.prompt.history,
    history_fields=tuple(config.prompt.history_fields),
    num_candidates=slates_lib.read_meta(slates)['candidates'],
    reasoning=config.prompt.reasoning_tokens,
    budget=config.prompt.budget,
  )
  own = config.model.to_dict()
  own['num_layers'] = layers or own['num_layers']
  del own['source'], own['new_rows']  # What `backbone` alone reads.
  trained = lora.Adapters(
    rank=own.pop('lora_rank'),
    targets=tuple(own.pop('lora_targets')),
    first_row=words.first_symbol,
  )
  whole = Setup(
    catalog=catalog,
    prompter=prompter,
    grammar=grammar_lib.Ranking(
      slot_base=words.slot_base,
      num_slots=words.layout.num_slots,
      num_candidates=prompter.num_candidates,
      think_end=words.control['</think>'],
      eos=words.eos,
      pad=words.pad,
    ),
    model=transformer.TransformerConfig(
      vocab_size=len(words),
      memory_base=words.memory_base,
      num_memory=words.layout.num_memory,
      **own,
    ),
    mesh=sharding.make_mesh(**config.mesh.to_dict()),
    adapters=trained,
    slates=slates,
  )
  if not context_lib.parse(context).text:
    return whole.reading(context)
  longest = artifacts.read_results(inputs['compress'])['longest']
  return whole.reading_written(inputs['compress'], longest)


def found_vocabulary(
  config,
  slates: pathlib.Path,
  tokenizer: pathlib.Path,
  home: pathlib.Path,
  phrases: tuple[str, ...],
  backbone: Any = None,
) -> None:
  """Makes the vocabulary and fits the evidence bins.

  The vocabulary is trained on the catalog's text, or a pretrained model's with
  our symbols added.

  Args:
    config: section `prompt`.
    slates: artifact of that stage.
    tokenizer: likewise.
    home: where vocabulary and BINS go.
    phrases: text beside the catalog's whose words are worth a piece each, as
      those of category names are.
    backbone: an `hf.Backbone`, or None.
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
  sids = ids.load(tokenizer)
  layout = _layout(config.prompt, sids)
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
  bins_lib.save(home / BINS, bins)  # Last: it says that both are there.


def _layout(config, sids: ids.SemanticIds) -> vocabulary.Layout:
  """The symbol families that a prompt config and semantic IDs ask for."""
  return vocabulary.Layout(
    evidence=tuple(config.evidence),
    bins=config.bins,
    num_slots=config.num_slots,
    num_memory=config.num_memory,
    levels=sids.levels,
    codebook_size=sids.codebook_size,
  )
