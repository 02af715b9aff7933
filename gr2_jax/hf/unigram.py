"""A SentencePiece unigram model in the form of Hugging Face's `tokenizers`."""

# Types of pieces in sentencepiece_model.proto.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_SPACE = '▁'  # Stands for a space.


def tokenizer_json(model: bytes) -> str:
  """JSON for `tokenizers.Tokenizer.from_str`, from a SentencePiece model.

  `model` is a serialized unigram model of `vocabulary.train` that falls back to
  bytes; ids and text stay the same. Its symbols become added tokens, so that a
  server shows them and accepts them in a prompt; control pieces become special
  tokens, which it may leave out. Unlike SentencePiece, the result reads a
  control piece that is spelled out as that token, and the text behind a symbol
  as a separate text that begins with a space, as `Vocabulary.encode` does.

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
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.Unigram(
      [(p.piece, p.score) for p in pieces], unknown, byte_fallback=True
    )
  )
  tokenizer.add_tokens(
    [
      tokenizers.AddedToken(
        p.piece, normalized=False, special=p.type != _USER_DEFINED
      )
      for p in pieces
      if p.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )
  tokenizer.normalizer = normalizers.Sequence(
    [
      normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
      normalizers.Replace(tokenizers.Regex(' +'), ' '),
      normalizers.Strip(),
    ]
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
    _SPACE, prepend_scheme='always', split=False
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  return tokenizer.to_str()
