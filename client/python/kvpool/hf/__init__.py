"""transformers on kvpool's pages: `KVPoolCache`, for `model.generate(past_key_values=...)`.

    spec = kvpool.hf.pool_spec(model, "llama", pages=1024, page_size=16)
    with client.create_pool(spec) as pool, kvpool.hf.KVPoolCache(model.config, pool) as cache:
        model.generate(**inputs, past_key_values=cache)

A row of the batch is a sequence of the pool; padding is stored like any token. The pool has the model's layers, in
their order, and its dtype. Models whose layers are of full, sliding or chunked attention; all sequences of a batch have
one length. One thread at a time. A deep copy is a fork; a cache that is let go is closed by the next one's pass, unless
it is durable.
"""
from __future__ import annotations

from . import continuous
from ._rows import Handle
from .cache import KVPoolCache, KVPoolLayer, pool_spec

__all__ = ["Handle", "KVPoolCache", "KVPoolLayer", "continuous", "pool_spec"]
