"""`KVPoolCache`, a transformers cache on kvpool's pages. `_rows` has how a forward pass uses them."""
from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InvalidArgument
from ..spec import PoolSpec
from ._rows import Handle, Rows

if TYPE_CHECKING:
    from ..pool import Pool
    from ..sequence import Sequence


def pool_spec(config: Any, name: str, pages: int, page_size: int, dtype: str = "float16", **more: Any) -> PoolSpec:
    """The spec of a pool for a model of `config`; `more` are further fields of PoolSpec. Raises InvalidArgument for a
    model whose layers are not all full attention."""
    config = config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise InvalidArgument(f"the model has layers of {', '.join(sorted(kinds))}; only full attention is served")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim, v_head_dim = getattr(config, "head_dim", None), None
    if getattr(config, "kv_lora_rank", None):  # MLA: transformers caches what it unfolds
        heads, v_head_dim = config.num_attention_heads, config.v_head_dim
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    return PoolSpec(name, pages, page_size, layers=config.num_hidden_layers, kv_heads=heads, head_dim=head_dim,
                    v_head_dim=v_head_dim, dtype=dtype, **more)


class KVPoolLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a `KVPoolCache`. What concerns all layers at once is asked of the cache."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: Rows, index: int) -> None:
        super().__init__()
        self._rows = rows
        self._index = index

    def lazy_initialization(self, key_states: Any, value_states: Any = None) -> None:
        """Nothing: the memory is the pool's."""
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store [batch, heads, tokens, dim] behind what is there; all of it, [batch, heads, length, dim]."""
        self.is_initialized = True
        return self._rows.update(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """(length with the query, 0). Earlier versions give the query's positions instead of its length."""
        n = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        return self.get_seq_length() + n, 0

    def get_seq_length(self, *args: Any) -> int:
        """Tokens of each sequence."""
        return self._rows.lengths[self._index]

    def get_max_length(self) -> int:
        """No limit of its own: the pool's pages are."""
        return -1

    get_max_cache_shape = get_max_length


class KVPoolCache(Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values lie in a pool of kvpool.

    For `generate` of any kind that a DynamicCache serves: greedy, sampling, beams (a beam is a fork), assisted
    decoding (crop), left padding, batches. A context manager: its sequences are closed at the end of its block.
    """

    def __init__(self, config: Any, pool: Pool) -> None:
        wanted = pool_spec(config, pool.name, pool.pages, pool.page_size, pool.info.spec.dtype)
        if wanted.all_planes() != pool.planes:
            raise InvalidArgument(f"pool {pool.name} has not the planes of that model; see kvpool.hf.pool_spec")
        self._rows = Rows(pool)
        super().__init__(layers=[KVPoolLayer(self._rows, index) for index in range(pool.layers)])

    def __enter__(self) -> KVPoolCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    @property
    def sequences(self) -> list[Sequence]:
        """The pool's sequences, one a row of the batch; [] before the first pass."""
        return list(self._rows.seqs)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -n tokens of each sequence (n < 0), or all behind the first n (n > 0, as earlier versions)."""
        length, change = self._rows.lengths[0], int(tokens_to_remove)  # assisted decoding passes a tensor
        wanted = min(change, length) if change > 0 else max(length + change, 0)
        if wanted != length:
            self._rows.crop(wanted)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes row beam_idx[i]."""
        self._rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._rows.select([row for row in range(len(self._rows.seqs)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows of `indices`."""
        self._rows.select(torch.arange(len(self._rows.seqs))[indices.cpu()].tolist())

    def reset(self) -> None:
        """Give the sequences up; the cache is empty, and of use again."""
        self._rows.reset()

    def close(self) -> None:
        """The same, and let the pool's memory go."""
        self._rows.end()

    def export(self, to: int) -> Handle:
        """Hand the generation to another session (its `client.session.session_id`), without copying. The cache is
        empty after. Raises NotFound where that session has not the pool attached."""
        return self._rows.give(to)

    @classmethod
    def attach(cls, config: Any, pool: Pool, handle: Handle) -> KVPoolCache:
        """A cache that goes on with what another process exported to this one's session."""
        if handle.pool != pool.name:
            raise InvalidArgument(f"the generation is in pool {handle.pool}, not in {pool.name}")
        cache = cls(config, pool)
        cache._rows.take(handle)
        return cache
