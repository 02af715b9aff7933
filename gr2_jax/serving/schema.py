"""The OpenAPI document of the service, with the limits in force.

The bodies of requests come from the declarations that also check them.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import gr2_jax
from gr2_jax.ops import parsing
from gr2_jax.serving import examples as examples_lib
from gr2_jax.serving import fields
from gr2_jax.serving import reranker as reranker_lib
from gr2_jax.serving import service as service_lib

_IDS = fields.List(fields.ID).schema
_BODY_ERRORS = {
  400: 'The error names place, field and cure',
  408: 'The body took too long to arrive',
  413: 'The body is too large',
}
_QUERY_ERRORS = {400: 'The error names the field'}


def openapi(
  policy: reranker_lib.Reranker,
  limits: service_lib.Limits,
  paths: Iterable[str],
) -> dict[str, Any]:
  """The OpenAPI 3.1 document of the paths that are served."""
  rank = _operation('Ranks slates', errors=_BODY_ERRORS) | {
    'operationId': 'rank',
    'requestBody': _body(service_lib.rank_body(policy, limits)),
  }
  rank['responses'] |= {
    '200': _json('An answer for each slate', _answers(list(policy.programs))),
    '503': _error('The queue is full, or the service is shutting down')
    | {'headers': {'Retry-After': {'schema': {'type': 'integer'}}}},
  }
  reload_errors = _BODY_ERRORS | {
    401: 'The token is missing or wrong',
    409: 'Another reload is under way',
  }
  reload = _operation(
    'Swaps the policy for one whose folder lies beside it', errors=reload_errors
  ) | {
    'security': [{'token': []}],
    'requestBody': _body(service_lib.RELOAD),
  }
  operations = {
    '/rank': {'post': rank},
    '/health': {'get': _operation('The state of the service')},
    '/metrics': {'get': _operation('Counters for Prometheus', 'text/plain')},
    '/openapi.json': {'get': _operation('This document')},
    '/items': {
      'get': _operation('Titles of items', errors=_QUERY_ERRORS)
      | _query('id', examples_lib.NAMES)
    },
    '/example': {
      'get': _operation('A test slate of the data set', errors=_QUERY_ERRORS)
      | _query('place', examples_lib.PLACE)
    },
    '/reload': {'post': reload},
    '/': {'get': _operation('A page for people', 'text/html')},
  }
  return {
    'openapi': '3.1.0',
    'info': {
      'title': 'gr2_jax',
      'version': gr2_jax.__version__,
      'description': 'Re-ranks slates of candidates for a history.',
    },
    'paths': {path: operations[path] for path in paths},
    'components': {
      'securitySchemes': {'token': {'type': 'http', 'scheme': 'bearer'}}
    },
  }


def _answers(modes: list[str]) -> dict[str, Any]:
  """Schema of the answer of /rank."""
  line = {
    'id': fields.ID.schema,
    'ranking': _IDS | {'description': 'candidates, best first'},
    'order': {
      'type': 'array',
      'items': {'type': 'integer'},
      'description': 'the ranking in incoming ranks, from 0',
    },
    'reasoning': {
      'type': 'string',
      'description': '<slot3> is the candidate of incoming rank 3',
    },
    'verdict': {
      'enum': [*parsing.VERDICTS, None],
      'description': 'null: the policy has not ranked the slate',
    },
    'scores': {
      'type': 'array',
      'items': {'type': ['number', 'null']},
      'description': 'of the read-out, one per candidate as given',
    },
    'unknown_history': {'type': 'integer'},
    'described_candidates': _IDS
    | {'description': 'the catalog lacks them; ranked by their description'},
    'mode': {'enum': modes},
    'unknown_candidates': _IDS | {'description': 'they keep their places'},
    'timed_out': {
      'type': 'boolean',
      'description': 'the ranking is the incoming order',
    },
  }
  return _object(
    artifact={'type': 'string', 'description': 'the policy'},
    answers={'type': 'array', 'items': _object(**line)},
  )


def _operation(
  summary: str,
  media_type: str = 'application/json',
  errors: Mapping[int, str] | None = None,
) -> dict[str, Any]:
  responses = {'200': {'description': summary, 'content': {media_type: {}}}}
  for status, text in (errors or {}).items():
    responses[str(status)] = _error(text)
  return {'summary': summary, 'responses': responses}


def _body(body: fields.Object) -> dict[str, Any]:
  content = {'application/json': {'schema': body.schema}}
  return {'required': True, 'content': content}


def _query(name: str, kind: fields.Kind | fields.List) -> dict[str, Any]:
  return {'parameters': [{'name': name, 'in': 'query', 'schema': kind.schema}]}


def _json(text: str, schema: dict[str, Any]) -> dict[str, Any]:
  content = {'application/json': {'schema': schema}}
  return {'description': text, 'content': content}


def _error(text: str) -> dict[str, Any]:
  return _json(text, _object(error={'type': 'string'}))


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
  """An object that has all of these properties."""
  return {
    'type': 'object',
    'required': list(properties),
    'properties': properties,
  }
