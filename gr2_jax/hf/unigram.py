"""A SentencePiece unigram model in the form of Hugging Face's `tokenizers`."""

# How sentencepiece_model.proto numbers the types of pieces.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_SPACE = '▁'  # What SentencePiece writes for a space.


def tokenizer_json(model: bytes) -> str:
  """Serialises a model of `vocabulary.train`, ids and text unchanged.

  Its symbols become added tokens, so that a server shows them and reads them
  in a prompt; control pieces are special ones, which it may leave out. Unlike
  SentencePiece, the result reads a control piece that is spelt out as that
  token, and the text behind a symbol as a text of its own, which begins with a
  space: what `Vocabulary.encode` gives for it.

  Args:
    model: a serialised SentencePiece unigram model that falls back to bytes.

  Returns:
    JSON, as `tokenizers.Tokenizer.from_str` reads it.

  Raises:
    ModuleNotFoundError: the extra `hf` is not installed.
  """
  try:
    import tokenizers
  except ModuleNotFoundError as e:
    raise ModuleNotFoundError(
      f"a Hugging Face tokenizer needs {e.name}: pip install 'gr2_jax[hf]'"
    ) from e
  from sentencepiece import sentencepiece_model_pb2
  from tokenizers import decoders, normalizers, pre_tokenizers

  proto = sentencepiece_model_pb2.ModelProto.FromString(model)
  pieces = proto.pieces
  unknown = next(i for i, p in enumerate(pieces) if p.type == _UNKNOWN)
  found = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      [(p.piece, p.score) for p in pieces], unknown, byte_fallback=True
    )
  )
  found.add_tokens(
    [
      tokenizers.AddedToken(
        p.piece, normalized=False, special=p.type != _USER_DEFINED
      )
      for p in pieces
      if p.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )
  found.normalizer = normalizers.Sequence(
    [
      normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
      normalizers.Replace(tokenizers.Regex(' +'), ' '),
      normalizers.Strip(),
    ]
  )
  found.pre_tokenizer = pre_tokenizers.Metaspace(
    _SPACE, prepend_scheme='always', split=False
  )
  found.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  return found.to_str()
