"""`KVPoolCache`, a transformers cache on kvpool's pages. `_rows` has how a forward pass uses them."""
from __future__ import annotations

import copy
import operator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from ..errors import InvalidArgument, NotServed
from ..pool import Pool
from ..spec import PoolSpec
from ._rows import Handle, Rows

if TYPE_CHECKING:
    from ..sequence import Sequence

_Shapes = tuple[tuple[int, int], tuple[int, int]]
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}  # and their sizes


def _text_config(config: Any) -> Any:
    if not isinstance(config, PretrainedConfig):
        raise InvalidArgument(f"{type(config).__name__} is no transformers config: model.config is one")
    if config.is_encoder_decoder:
        raise InvalidArgument("the model has an encoder and a decoder; only decoders are served")
    return config.get_text_config(decoder=True)


def _windows(config: Any) -> list[int]:
    """Of each layer that has a cache, how many tokens its attention sees; 0: all. As DynamicCache takes it from a
    config; a layer of chunks is one with a window, to a cache."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        said = [kind for kind, size in _WINDOWS.items() if getattr(config, size, None) is not None]
        kinds = [*said, "full_attention"][:1] * config.num_hidden_layers
    kinds = kinds[: len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)]
    others = {*kinds, *(getattr(config, "block_types", None) or [])} - {"attention", "full_attention", *_WINDOWS}
    if getattr(config, "cross_attention_layers", None):
        others.add("cross_attention")
    if others:
        raise InvalidArgument(
            f"the model has layers of {', '.join(sorted(others))}; only full, sliding and chunked attention are served")
    return [getattr(config, _WINDOWS[kind]) if kind in _WINDOWS else 0 for kind in kinds]


def _said_shapes(config: Any) -> list[_Shapes]:
    """What a model of `config` may cache a layer, as (heads, dim) of K and of V. One of MLA caches what it compresses
    K and V into, or K and V themselves; older models have one head for all queries, or so many, or as many as there
    are of queries: which of them is the model's code's."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        rope = config.qk_rope_head_dim
        whole = (config.num_attention_heads, config.qk_nope_head_dim + rope), (
            config.num_attention_heads, config.v_head_dim)
        return [((1, config.kv_lora_rank), (1, rope)), whole]
    dim = (getattr(config, "head_dim", None) or getattr(config, "dim_head", None)
           or config.hidden_size // config.num_attention_heads)
    other = [getattr(config, "num_kv_heads", None), 1 if getattr(config, "multi_query", False) else None]
    return [((n, dim), (n, dim)) for n in dict.fromkeys([heads, *filter(None, other)])]


def _seen_shapes(model: Any) -> tuple[_Shapes, torch.dtype]:
    """What the model hands to a cache, of one token, and its dtype."""
    cache = DynamicCache(config=model.config)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), past_key_values=cache)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{type(model).__name__} takes no tokens and a cache: {error}") from error
    if not cache.layers or any(getattr(layer, "keys", None) is None for layer in cache.layers):
        raise InvalidArgument(f"{type(model).__name__} hands no keys and values to a cache")
    found = {tuple((part.shape[1], part.shape[3]) for part in (layer.keys, layer.values)) for layer in cache.layers}
    if len(found) != 1:
        raise InvalidArgument(f"the model's layers differ in what they cache: {sorted(found)}")
    k, v = found.pop()
    return (k, v), cache.layers[0].keys.dtype


def _spec(config: Any, shapes: _Shapes, **more: Any) -> PoolSpec:
    (heads, dim), (v_heads, v_dim) = shapes
    layers = len(_windows(config))
    if getattr(config, "kv_lora_rank", None) and heads == v_heads == 1:
        return PoolSpec(layers=layers, ckv_dim=dim, kpe_dim=v_dim, **more)
    if heads != v_heads:
        raise InvalidArgument(f"the model caches K of {heads} heads and V of {v_heads}; they must be as many")
    return PoolSpec(layers=layers, kv_heads=heads, head_dim=dim, v_head_dim=v_dim, **more)


def pool_spec(model: Any, name: str, pages: int, page_size: int, dtype: str | torch.dtype | None = None, **more: Any
              ) -> PoolSpec:
    """The spec of a pool for a model, or for one of a config; `more` are further fields of PoolSpec.

    `dtype`: None: what the model caches, of a config float16. A model is asked, by a forward pass of one token; one of
    MLA or of multi-query attention must be, since its config does not tell what it caches. Raises InvalidArgument where
    that is so, and for a model with layers that are no attention or a sparse one, or that has an encoder.
    """
    config = _text_config(model.config if hasattr(model, "config") else model)
    _windows(config)
    if hasattr(model, "config"):
        shapes, seen = _seen_shapes(model)
        dtype = dtype or seen
    else:
        said = _said_shapes(config)
        if len(said) > 1:
            raise InvalidArgument("what such a model caches is not in its config: pool_spec must be given the model")
        shapes = said[0]
    return _spec(config, shapes, name=name, pages=pages, page_size=page_size,
                 dtype=str(dtype or "float16").removeprefix("torch."), **more)


def _alone(self: KVPoolLayer, *args: Any, **kwargs: Any) -> None:
    """Raises NotServed: a row is one sequence of the pool, with all layers."""
    raise NotServed("the layers of a KVPoolCache are cropped, reset and put in order together, by the cache's own "
                    "methods, and stay where the pool is")


class KVPoolLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a `KVPoolCache`. What concerns all layers at once is asked of the cache."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, rows: Rows, index: int) -> None:
        self._rows = rows
        self._index = index
        self.is_initialized = False
        self.is_sliding = rows.windows[index] > 0

    @property
    def keys(self) -> Any:
        """What is there, [batch, heads, length, dim], or the end of it that a window leaves: a copy; None before the
        first pass."""
        return self._rows.held(self._index)[0] if self._rows.seqs else None

    @property
    def values(self) -> Any:
        """The same of the values."""
        return self._rows.held(self._index)[1] if self._rows.seqs else None

    crop = reset = offload = prefetch = reorder_cache = batch_repeat_interleave = batch_select_indices = _alone

    def lazy_initialization(self, key_states: Any, value_states: Any = None) -> None:
        """Nothing: the memory is the pool's."""
        self.is_initialized = True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Store [batch, heads, tokens, dim] behind what is there; all that the tokens may see of it, [batch, heads,
        length, dim]."""
        self.is_initialized = True
        return self._rows.update(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """How many tokens `update` will return, and which is the first of them. Earlier versions give the query's
        positions instead of its length."""
        n = query_length if isinstance(query_length, int) else int(query_length.shape[0])
        length = self.get_seq_length()
        first = self._rows.seen_from(self._index, length)
        return length - first + n, first

    def get_seq_length(self, *args: Any) -> int:
        """Tokens of each sequence."""
        return self._rows.lengths[self._index]

    def get_max_length(self) -> int:
        """The window; -1: no limit of its own, the pool's pages are."""
        return self._rows.windows[self._index] or -1

    get_max_cache_shape = get_max_length


class KVPoolCache(Cache):  # type: ignore[misc]
    """A transformers cache whose keys and values lie in a pool of kvpool.

    For `generate` of any kind that a DynamicCache serves: greedy, sampling, beams (a beam is a fork), assisted
    decoding (crop), left padding, batches. A context manager: its sequences are closed at the end of its block.
    `durable`: should this process die, its sequences wait for the pool's linger_ms, for a `Client.claim`.
    """

    def __init__(self, config: Any, pool: Pool, *, durable: bool = False) -> None:
        config = _text_config(config)
        if not isinstance(pool, Pool):
            raise InvalidArgument(f"{type(pool).__name__} is no kvpool.Pool: Client.attach and create_pool give one")
        given = {"name": pool.name, "pages": pool.pages, "page_size": pool.page_size, "dtype": pool.info.spec.dtype}
        if pool.planes not in [_spec(config, shapes, **given).all_planes() for shapes in _said_shapes(config)]:
            raise InvalidArgument(f"pool {pool.name} has not the planes of that model; see kvpool.hf.pool_spec")
        if durable and not pool.info.spec.linger_ms:
            raise InvalidArgument(f"pool {pool.name} has linger_ms 0: nothing of a process that died waits for a claim")
        self._rows = Rows(pool, durable, _windows(config))
        super().__init__(layers=[KVPoolLayer(self._rows, index) for index in range(pool.layers)])

    def __deepcopy__(self, memo: dict[int, Any]) -> KVPoolCache:
        """Another cache of the same tokens, on forks: full pages are shared. To go on from one prompt several times."""
        twin = memo[id(self)] = copy.copy(self)
        twin._rows = self._rows.fork()
        twin.layers = [KVPoolLayer(twin._rows, index) for index in range(len(self.layers))]
        return twin

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
        """Drop the last -n tokens of each sequence (n < 0), or all behind the first n (n > 0, as earlier versions).
        Behind a pass that did not end, of the tokens that were there before it."""
        change = operator.index(tokens_to_remove)  # assisted decoding passes a tensor
        self._rows.go_back()
        length = self._rows.lengths[0]
        wanted = min(change, length) if change > 0 else max(length + change, 0)
        if wanted != length:
            self._rows.crop(wanted)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Row i becomes row beam_idx[i]."""
        self._rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if repeats < 0:
            raise InvalidArgument(f"each row {repeats} times: that is less than none")
        self._rows.select([row for row in range(len(self._rows.seqs)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the rows of `indices`."""
        self._rows.select(torch.arange(len(self._rows.seqs))[torch.as_tensor(indices).cpu()].tolist())

    def reset(self) -> None:
        """Give the sequences up; the cache is empty, and of use again."""
        self._rows.reset()

    def close(self) -> None:
        """The same, and let the pool's memory go: the cache is of no further use."""
        self._rows.end()

    def handle(self) -> Handle:
        """What another process needs to go on, should this one die (`durable`); there from the first pass on."""
        return self._rows.handle()

    def export(self, to: int) -> Handle:
        """Hand the generation to another session (its `client.session.session_id`), without copying. The cache is
        empty after. Raises NotFound where that session has not the pool attached."""
        return self._rows.give(to)

    @classmethod
    def attach(cls, config: Any, pool: Pool, handle: Handle, *, durable: bool = False) -> KVPoolCache:
        """A cache that goes on with what another process exported to this one's session, or left to its claim. Raises
        InvalidArgument of a handle for another pool, NotFound where this session has not its sequences, Busy where
        another cache of this process has them, Mismatch where they have not the tokens that it says."""
        if not isinstance(handle, Handle):
            raise InvalidArgument(f"{type(handle).__name__} is no kvpool.hf.Handle: export() and handle() give one")
        if isinstance(pool, Pool) and handle.pool != pool.name:
            raise InvalidArgument(f"the generation is in pool {handle.pool}, not in {pool.name}")
        cache = cls(config, pool, durable=durable)
        cache._rows.take(handle)
        return cache
