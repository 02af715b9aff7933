"""The OpenAPI description of the service, with the limits that it has."""

from collections.abc import Iterable
from typing import Any

import gr2_jax
from gr2_jax.data import descriptions
from gr2_jax.data import evidence as evidence_lib
from gr2_jax.ops import parsing
from gr2_jax.serving import examples as examples_lib
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.serving import service as service_lib

_ITEM = {
  'oneOf': [{'type': 'string'}, {'type': 'integer'}],
  'description': 'an item id',
}
_DESCRIPTION = {
  'type': 'object',
  'required': ['item_id', 'title'],
  'properties': {
    'item_id': _ITEM,
    'title': {
      'type': 'string',
      'maxLength': descriptions.TITLE,
      'pattern': '\\S',
    },
    'categories': {
      'type': ['array', 'null'],
      'items': {'type': 'string', 'maxLength': descriptions.NAME},
      'maxItems': descriptions.CATEGORIES,
      'description': 'wide to narrow',
    },
    'brand': {'type': ['string', 'null'], 'maxLength': descriptions.NAME},
    'year': {'type': ['integer', 'null'], 'minimum': 0, 'maximum': 9999},
  },
}
_MOMENT = {'minimum': -(2**53), 'maximum': 2**53}
_ERROR = {
  'type': 'object',
  'required': ['error'],
  'properties': {'error': {'type': 'string'}},
}


def openapi(
  policy: reranker_lib.Reranker,
  limits: service_lib.Limits,
  paths: Iterable[str],
) -> dict[str, Any]:
  """OpenAPI 3.1, of the paths that are served."""
  known = {
    '/rank': {'post': _rank(policy, limits)},
    '/health': {'get': _get('What it serves')},
    '/metrics': {'get': _get('Counters for Prometheus', kind='text/plain')},
    '/openapi.json': {'get': _get('This description')},
    '/items': {'get': _items()},
    '/example': {'get': _example()},
    '/reload': {'post': _reload()},
    '/': {'get': _get('A page for people', kind='text/html')},
  }
  return {
    'openapi': '3.1.0',
    'info': {
      'title': 'gr2_jax',
      'version': gr2_jax.__version__,
      'description': 'Re-ranks slates of candidates for a history.',
    },
    'paths': {path: known[path] for path in paths},
    'components': {
      'securitySchemes': {'token': {'type': 'http', 'scheme': 'bearer'}}
    },
  }


def _rank(
  policy: reranker_lib.Reranker, limits: service_lib.Limits
) -> dict[str, Any]:
  slate = {
    'type': 'object',
    'required': ['candidates', 'history'],
    'properties': {
      'candidates': {
        'type': 'array',
        'items': _ITEM,
        'minItems': 1,
        'maxItems': policy.candidates,
        'uniqueItems': True,
        'description': 'in the incoming order; 7 and "7" are the same item',
      },
      'history': {
        'type': 'array',
        'items': _ITEM,
        'maxItems': limits.history,
        'description': 'oldest first; unknown items are dropped and counted',
      },
      'items': {
        'type': ['array', 'null'],
        'items': _DESCRIPTION,
        'maxItems': policy.candidates + evidence_lib.REACH,
        'description': (
          'those of both lists that the catalog lacks; of items '
          'that it has, its own description counts'
        ),
      },
      'history_grades': {
        'type': ['array', 'null'],
        'items': {'enum': [1, 2, None]},
        'description': 'how the user took to each item, 2 the better',
      },
      'history_times': {
        'type': ['array', 'null'],
        'items': {'type': ['number', 'null']} | _MOMENT,
        'description': 'when, one per item of the history',
      },
      'scores': {
        'type': ['array', 'null'],
        'items': {'type': 'number', 'minimum': -3e38, 'maximum': 3e38},
        'description': "the incoming ranker's, one per candidate",
      },
      'time': {
        'type': ['number', 'null'],
        **_MOMENT,
        'description': 'in the unit of the log; the last one where missing',
      },
      'user': {'type': ['string', 'integer', 'null']},
      'id': {'type': ['string', 'integer', 'null']},
    },
  }
  modes = list(policy.programs)
  request = {
    'type': 'object',
    'required': ['slates'],
    'additionalProperties': False,
    'properties': {
      'slates': {
        'type': 'array',
        'items': slate,
        'minItems': 1,
        'maxItems': limits.slates,
      },
      'mode': {
        'enum': modes,
        'default': modes[0],
        'description': (
          'score: one pass, no decoding; rank: the ranking is decoded; reason: '
          'reasoning is, then the ranking'
        ),
      },
      'timeout': {
        'type': 'number',
        'exclusiveMinimum': 0,
        'maximum': limits.seconds,
        'default': limits.seconds,
        'description': 'seconds until the incoming order is the answer',
      },
    },
  }
  return {
    'operationId': 'rank',
    'summary': 'Ranks slates',
    'requestBody': {
      'required': True,
      'content': _content(request),
    },
    'responses': {
      '200': _response('An answer for each slate', _content(_answers(modes))),
      **_errors(
        {
          400: 'The request names field and cure',
          408: 'The body took too long to come in',
          413: 'The body is too large',
        }
      ),
      '503': _response('The queue is full, or it drains', _content(_ERROR))
      | {'headers': {'Retry-After': {'schema': {'type': 'integer'}}}},
    },
  }


def _answers(modes: list[str]) -> dict[str, Any]:
  ids = {'type': 'array', 'items': _ITEM}
  fields = {
    'id': {'type': ['string', 'integer']},
    'ranking': ids | {'description': 'candidates, best first'},
    'order': {
      'type': 'array',
      'items': {'type': 'integer'},
      'description': 'the same in incoming ranks, from 0',
    },
    'reasoning': {
      'type': 'string',
      'description': '<slot3> is the candidate of incoming rank 3',
    },
    'verdict': {
      'enum': [*parsing.VERDICTS, None],
      'description': 'null: the policy has not ranked it',
    },
    'scores': {
      'type': 'array',
      'items': {'type': ['number', 'null']},
      'description': 'of the read-out, one per candidate as given',
    },
    'unknown_history': {'type': 'integer'},
    'described_candidates': ids
    | {'description': 'the catalog lacks them; ranked by their description'},
    'mode': {'enum': modes},
    'unknown_candidates': ids | {'description': 'they kept their places'},
    'timed_out': {
      'type': 'boolean',
      'description': 'the ranking is the incoming order',
    },
  }
  line = {'type': 'object', 'required': list(fields), 'properties': fields}
  return {
    'type': 'object',
    'required': ['artifact', 'answers'],
    'properties': {
      'artifact': {'type': 'string', 'description': 'the policy'},
      'answers': {'type': 'array', 'items': line},
    },
  }


def _items() -> dict[str, Any]:
  return _get('Titles of items', 400) | {
    'parameters': [
      {
        'name': 'id',
        'in': 'query',
        'schema': {
          'type': 'array',
          'items': {'type': 'string'},
          'maxItems': examples_lib.MOST,
        },
      }
    ]
  }


def _example() -> dict[str, Any]:
  return _get('A test slate of the data set', 400) | {
    'parameters': [
      {
        'name': 'place',
        'in': 'query',
        'schema': {'type': 'integer', 'minimum': 0, 'maximum': 999_999_999},
      }
    ]
  }


def _reload() -> dict[str, Any]:
  request = {
    'type': 'object',
    'required': ['artifact'],
    'properties': {'artifact': {'type': 'string'}},
  }
  return {
    'summary': 'Swaps the policy for one whose folder lies beside it',
    'security': [{'token': []}],
    'requestBody': {'required': True, 'content': _content(request)},
    'responses': {
      '200': _response('It answers from now on', _content({'type': 'object'})),
      **_errors(
        {
          400: 'The present policy stays',
          401: 'The token is missing or wrong',
          408: 'The body took too long to come in',
          409: 'Another reload is under way',
          413: 'The body is too large',
        }
      ),
    },
  }


def _get(
  summary: str, *statuses: int, kind: str = 'application/json'
) -> dict[str, Any]:
  found = {'200': _response(summary, {kind: {}})}
  return {
    'summary': summary,
    'responses': found | _errors(dict.fromkeys(statuses, 'It says why')),
  }


def _errors(texts: dict[int, str]) -> dict[str, Any]:
  return {
    str(status): _response(text, _content(_ERROR))
    for status, text in texts.items()
  }


def _response(text: str, content: dict[str, Any]) -> dict[str, Any]:
  return {'description': text, 'content': content}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
  return {'application/json': {'schema': schema}}
