"""A language model that ranks: its spec, grammar, sampler and ranker."""
