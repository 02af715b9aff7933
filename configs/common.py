"""Composes the sections of all config files into one config.

Each file has `section(test)`, its own section, and `get_config(arg)`, which is
`compose(<stage>, arg)`. `arg` follows the colon of
`--config=configs/rl.py:test,dataset=files,model=small`:

  test          small sizes: each stage takes under a minute on two CPU cores
  dataset=NAME  source of the logs: movielens (default), world, files
  model=NAME    the language model: tiny (default), small, base, from scratch;
                smollm2_135m, pretrained; qwen3_0p6b .. qwen3_32b, pretrained
                where --config.model.source names a folder of the weights
  context=long  prompts describe fifty items and all candidates in full, the
                input of the compressor (default: short)
  seeds=N       seeds 0..N-1 for every seeded stage (default 1)
"""

import difflib
import importlib
from collections.abc import Callable, Iterable

from ml_collections import ConfigDict

DATASETS = ('movielens', 'world', 'files')

# Config file -> the section it holds.
SECTIONS = {
  'slates': 'data',
  'tokenizer': 'tokenizer',
  'midtrain': 'midtrain',
  'traces': 'traces',
  'sft': 'sft',
  'opd': 'opd',
  'rl': 'rl',
  'baselines': 'baselines',
  'evaluate': 'evaluate',
  'rerank': 'rerank',
  'export': 'export',
  'compress': 'compress',
  'internalize': 'internalize',
  'prune': 'prune',
  'study_compress': 'study_compress',
  'study_distill': 'study_distill',
  'study_hacking': 'study_hacking',
  'study_internalize': 'study_internalize',
  'study_prune': 'study_prune',
  'study_tokenizer': 'study_tokenizer',
}

# Evidence columns of a candidate, chosen on the validation slates of each
# source. `NAME` compares candidates of a slate; `NAME:raw` keeps its own scale.
EVIDENCE = {
  'movielens': (
    'incoming_rank',
    'popularity',
    'popularity:raw',
    'direction:raw',
    'genre:raw',
    'latent:raw',
    'age:raw',
    'co_short',
    'directed',
    'trend',
  ),
  'world': (
    'incoming_rank',
    'incoming_score',
    'leaf',
    'leaf:raw',
    'transition',
    'transition_max:raw',
    'genre:raw',
    'latent:raw',
    'text_mean',
    'popularity:raw',
  ),
  'files': (
    'incoming_rank',
    'popularity',
    'popularity:raw',
    'genre:raw',
    'latent:raw',
    'leaf',
    'co_short',
    'joint_mean',
    'text_mean',
    'transition',
  ),
}

MODELS = {
  'tiny': dict(
    d_model=64, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=32, d_ff=192
  ),
  'small': dict(
    d_model=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    d_ff=768,
  ),
  'base': dict(
    d_model=768,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    d_ff=2304,
  ),
  'smollm2_135m': dict(
    source='smollm2',
    d_model=576,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    d_ff=1536,
    rope_base=1e5,
    norm_eps=1e-5,
    qk_norm=False,
    dtype='bfloat16',
  ),
}

# Qwen3 dense (arXiv 2505.09388): preset -> width, layers, query heads,
# feed-forward width, whether input and output share one embedding.
QWEN3 = {
  'qwen3_0p6b': (1024, 28, 16, 3072, True),
  'qwen3_1p7b': (2048, 28, 16, 6144, True),
  'qwen3_4b': (2560, 36, 32, 9728, True),
  'qwen3_8b': (4096, 36, 32, 12288, False),
  'qwen3_14b': (5120, 40, 40, 17408, False),
  'qwen3_32b': (5120, 64, 64, 25600, False),
}
MODELS |= {
  name: dict(
    d_model=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=8,
    head_dim=128,
    d_ff=d_ff,
    tie_embeddings=tied,
    rope_base=1e6,
    dtype='bfloat16',
    remat=True,
  )
  for name, (width, layers, heads, d_ff, tied) in QWEN3.items()
}

# Defaults for a pretrained model: it reads titles, and smaller learning rates
# preserve its parameters.
PRETRAINED = {
  'prompt.fields': ('sid', 'title', 'categories', 'evidence'),
  'prompt.history_fields': ('sid', 'title'),
  'prompt.title_tokens': 12,
  'prompt.reasoning_tokens': 24,
  'midtrain.learning_rate': 3e-4,
  'sft.learning_rate': 2e-4,
  'opd.learning_rate': 1e-5,
  'rl.learning_rate': 1e-5,
}
# Fewer, larger steps: such a model can already copy and compare.
PRETRAINED_SIZES = {
  'midtrain.steps': 150,
  'midtrain.batch_size': 32,
  'midtrain.eval_every': 75,
  'midtrain.mixture.pointing': 0.2,
  'sft.steps': 1600,
  'sft.batch_size': 32,
  'sft.eval_every': 400,
}
RECIPES = dict.fromkeys(('smollm2_135m', *QWEN3), PRETRAINED)

# Contexts worth compressing: all known fields of each item, words included.
# Policies train on contexts with parts left out, so that they can read any
# shorter form, and mostly on the content of a short prompt: it costs a quarter
# of a full one, and the policy learns sooner to write a ranking.
BRIEF = 'last:4+history:sid+candidates:sid,evidence'
LONG = {
  'prompt.history_fields': ('sid', 'title', 'categories', 'grade', 'age'),
  'prompt.fields': ('sid', 'title', 'categories', 'evidence'),
  'prompt.title_tokens': 4,
  'prompt.num_memory': 64,
  'midtrain.context': BRIEF,
  'sft.contexts': (BRIEF,) * 6 + ('dropped:240',) * 3 + ('full',),
}
LONG_SIZES = {
  'data.history': 50,
  'prompt.history': 50,
  'data.max_slates_train': 40,
  'data.max_slates_eval': 15,
  'sft.batch_size': 8,
  'rl.batch_size': 8,
  'rl.refill_size': 8,
  'evaluate.batch_size': 32,
} | {
  f'{stage}.{field}': size
  for stage in ('sft', 'opd', 'rl', 'internalize', 'prune')
  for field, size in (('eval_slates', 256), ('eval_batch_size', 32))
}
LONG_TEST_SIZES = {'prompt.history': 12}

SYSTEM = (
  'You are an analyst of a catalog. You read the items that a user has engaged '
  'with, then candidates with evidence beside each, and put the candidates in '
  'order, most relevant first. You reason from patterns in the items and from '
  'the evidence, briefly and without praise.'
)


class ConfigError(Exception):
  """An invalid config argument; the message names the nearest valid one."""


def compose(stage: str, arg: str = '') -> ConfigDict:
  """The whole config, for a run whose target is `stage`.

  Args:
    stage: a key of SECTIONS.
    arg: comma-separated presets, see this file's docstring.

  Returns:
    `stage`, `seed`, `seeds`, and the sections `mesh`, `prompt`, `model` and
    those of all stages.

  Raises:
    ConfigError: an unknown key or value.
  """
  given = _parse(arg)
  test = given.get('test', False)
  config = ConfigDict()
  config.stage = stage  # the target
  config.seeds = tuple(range(given.get('seeds', 1)))  # of the seeded stages
  config.seed = 0  # set to each of `seeds` in turn by the runner
  config.mesh = mesh()
  dataset = given.get('dataset', 'movielens')
  config.prompt = prompt(dataset)
  preset = given.get('model', 'tiny')
  config.model = model(preset)
  for name, section in SECTIONS.items():
    module = importlib.import_module(f'configs.{name}')
    config[section] = module.section(test=test)
  config.data.source = dataset
  thirds = config.model.num_layers * 2 // 3, config.model.num_layers // 3
  config.prune.layers, config.study_prune.layers = thirds[0], thirds
  if preset in RECIPES:
    sizes = {} if test else PRETRAINED_SIZES
    config.update_from_flattened_dict(RECIPES[preset] | sizes)
  if given.get('context', 'short') == 'long':
    sizes = LONG_TEST_SIZES if test else LONG_SIZES
    config.update_from_flattened_dict(LONG | sizes)
  return config


def mesh() -> ConfigDict:
  """Number of devices on each mesh axis."""
  config = ConfigDict()
  config.data = -1  # devices that split the batch; -1: all remaining ones
  config.fsdp = 1  # devices that split batch and parameters
  config.tensor = 1  # devices that split heads, feed-forward, vocabulary
  return config


def prompt(dataset: str = 'movielens') -> ConfigDict:
  """Content of a prompt."""
  config = ConfigDict()
  config.layout = ('history', 'candidates')  # order of the blocks
  config.history = 4  # most recent items shown
  # Of a candidate: sid, title, categories, evidence.
  config.fields = ('sid', 'evidence')
  # Of an item of the history: sid, title, categories, grade, age.
  config.history_fields = ('sid',)
  config.system = SYSTEM  # system message of a chat model; others ignore it
  config.knowledge = False  # whether a chat model gets general rules (KP)
  config.evidence = EVIDENCE[dataset]  # columns of a candidate
  config.bins = 8  # tokens per evidence column
  config.order = 'shuffled'  # order of candidates: shuffled, incoming, mixed
  config.num_slots = 20  # slot tokens, and so the longest possible slate
  config.num_memory = 0  # memory tokens available to contexts
  config.budget = 0  # tokens of a prompt, dropping old history; 0: no limit
  config.text_tokens = 500  # text pieces in the vocabulary
  config.title_tokens = 8  # longest title or category path
  config.reasoning_tokens = 16  # longest reasoning span
  return config


def training(
  steps: int, batch_size: int, learning_rate: float, eval_every: int
) -> ConfigDict:
  """Fields of every stage that trains the language model."""
  config = ConfigDict()
  config.steps = steps  # updates
  config.batch_size = batch_size  # slates per update
  config.learning_rate = learning_rate  # peak learning rate of AdamW
  config.warmup = 50  # updates to the peak; then cosine decay to a tenth of it
  config.weight_decay = 0.01  # of AdamW
  config.max_grad_norm = 1.0  # gradient clipping
  config.eval_every = eval_every  # updates between validations, checkpoints
  config.patience = 0  # validations without a new best before a stop; 0: off
  # Validations with rising reward and falling ranking before a stop; 0: off.
  config.reward_divergence_patience = 0
  config.resume = ''  # checkpoints folder of another run to resume from
  config.init_from = ''  # artifact whose parameters training starts from
  return config


def held_out(test: bool) -> ConfigDict:
  """Validation data of every stage that reads slates."""
  config = ConfigDict()
  config.eval_slates = 64 if test else 1024  # validation slates, fixed sample
  config.eval_batch_size = 64 if test else 256  # slates at a time
  return config


def validation(test: bool) -> ConfigDict:
  """Validation of a stage that learns to rank."""
  config = held_out(test)
  config.thinking = True  # reason before the ranking
  return config


def rollouts(
  test: bool,
  batch_size: int,
  steps: int,
  learning_rate: float,
  eval_every: int,
) -> ConfigDict:
  """Fields of every stage that learns from rewards of its own rollouts."""
  batch = 8 if test else batch_size
  config = training(
    steps=6 if test else steps,
    batch_size=batch,
    learning_rate=learning_rate,
    eval_every=3 if test else eval_every,
  )
  config.update(held_out(test))
  config.group_size = 4 if test else 8  # rollouts per slate
  config.temperature = 1.0  # of the sampler and of the learner
  config.constrained = True  # apply the grammar in training, as in serving
  # Replacement of groups whose rewards are all equal:
  config.refill_size = batch if test else batch // 4  # slates at a time
  config.refills = 4  # most replacements per step; 0: none
  config.advantage = 'dapo'  # dapo, grpo, dr_grpo, rloo
  config.average = 'token'  # averaging of token losses: token, sequence, fixed
  config.epochs = 1  # passes over the rollouts of a step
  config.minibatches = 1  # updates per epoch
  config.clip_low = 0.2  # probability ratios are clipped at 1 - clip_low
  config.clip_high = 0.28  # and at 1 + clip_high
  config.importance_cap = 0.0  # cap of importance weights; 0: no weights
  return config


def on_policy(
  test: bool, steps: int, learning_rate: float, eval_every: int
) -> ConfigDict:
  """Fields of every stage whose policy learns from its own rankings."""
  config = rollouts(test, 32, steps, learning_rate, eval_every)
  config.thinking = True  # reason before the ranking
  config.context = 'full'  # form of the context, see gr2_jax/prompts/context.py
  # Reward of a ranking: auc, ndcg, auc+ndcg, promotion, rr, recall.
  config.reward = 'auc+ndcg'
  config.k = 5  # cut-off of ndcg and recall
  config.gate = 'v2'  # reward of copied and invalid answers: none, v1, v2
  config.format_weight = 0.2  # a: reward for a valid answer
  config.order_cost = 0.0  # cost of answers that depend on the shown order
  config.overlong_buffer = 0  # last tokens of the budget that cost; 0: none
  config.overlong_weight = 1.0  # cost of the whole buffer
  config.judge_weight = 0.0  # weight of verified reasoning; 0: no judge
  config.credit = 'answer'  # advantage per answer or per placement
  config.selection_metric = 'n@5'  # selects the step by validation; or last
  return config


def endpoint() -> ConfigDict:
  """Fields of every stage that calls a model over HTTP."""
  config = ConfigDict()
  config.endpoint = ''  # OpenAI-compatible URL, e.g. http://localhost:8000/v1
  config.model = ''  # name of the model at the endpoint
  config.key_variable = ''  # environment variable of the key; '': no key
  config.answer_tokens = 1024  # longest answer
  config.request = ''  # JSON object of further request fields; null removes one
  config.concurrency = 8  # requests in flight
  config.timeout = 120.0  # seconds without a byte before a request fails
  config.retries = 6  # retries of a failed request, after growing waits
  config.token_limit = 1_000_000  # tokens in and out, all runs; 0: no limit
  config.prompt_price = 0.0  # price of a million prompt tokens
  config.answer_price = 0.0  # price of a million answer tokens
  return config


def model(preset: str = 'tiny') -> ConfigDict:
  """The decoder: source, trained parts, shape."""
  config = ConfigDict()
  config.source = ''  # Hugging Face folder, .gguf, smollm2; '': from scratch
  config.new_rows = 'text'  # init of added embeddings: noise, mean, text
  config.lora_rank = 0  # rank of adapters on a frozen model; 0: train all
  # Weights that get an adapter.
  config.lora_targets = ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
  # The fields of TransformerConfig:
  config.rope_base = 10_000.0  # wavelength base of the rotary positions
  config.rope_scaling = ''  # context extension: linear, llama3, yarn; '': none
  config.rope_factor = 1.0  # factor of the extension
  config.rope_length = 0  # positions before the extension; llama3, yarn
  config.rope_slow = 1.0  # turns within these at which a pair is fully scaled
  config.rope_fast = 4.0  # turns within these at which a pair is not scaled
  config.rope_magnitude = 1.0  # scale of rotated queries and keys; yarn
  config.qk_norm = True  # RMSNorm on queries and keys
  config.tie_embeddings = True  # one embedding for input and output
  config.norm_eps = 1e-6  # epsilon of every RMSNorm
  config.dtype = 'float32'  # of activations; parameters are float32
  config.remat = False  # recompute activations in the backward pass
  config.update(MODELS[preset])
  return config


def _parse(arg: str) -> dict[str, object]:
  """Parses the comma-separated presets."""
  readers: dict[str, Callable[[str], object]] = {
    'dataset': lambda v: _known('dataset', v, DATASETS),
    'model': lambda v: _known('model', v, MODELS),
    'context': lambda v: _known('context', v, ('short', 'long')),
    'seeds': _count,
  }
  given: dict[str, object] = {}
  for part in filter(None, (p.strip() for p in arg.split(','))):
    key, has_value, value = part.partition('=')
    _known('config argument', key, ('test', *readers))
    if (key == 'test') == bool(has_value):
      form = 'test' if key == 'test' else f'{key}=VALUE'
      raise ConfigError(f'config argument {part!r}: write {form}')
    if key in given:
      raise ConfigError(f'config argument {key!r} is given twice')
    given[key] = True if key == 'test' else readers[key](value)
  return given


def _known(what: str, name: str, names: Iterable[str]) -> str:
  """Returns `name`, or raises a ConfigError with the nearest of `names`."""
  names = tuple(names)
  if name in names:
    return name
  near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
  hint = f'did you mean {near[0]!r}? ' if near else ''
  raise ConfigError(f'unknown {what} {name!r}: {hint}known: {", ".join(names)}')


def _count(value: str) -> int:
  if not value.isdecimal() or int(value) < 1:
    raise ConfigError(f'seeds={value}: must be a number of seeds, 1 or more')
  return int(value)
