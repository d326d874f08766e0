"""transformers on kvpool's pages: `KVPoolCache`, for `model.generate(past_key_values=...)`.

    spec = kvpool.hf.pool_spec(model.config, "llama", pages=1024, page_size=16, dtype="bfloat16")
    with client.create_pool(spec) as pool, kvpool.hf.KVPoolCache(model.config, pool) as cache:
        model.generate(**inputs, past_key_values=cache)

A row of the batch is a sequence of the pool; padding is stored like any token. In a forward pass the first layer
reserves room for all of them (a call only where a page is missing) and makes the indices, each layer's K and V are
written by kvpool's append kernel and gathered for attention, and behind the last layer the tokens count as written.

    update(layer 0) ─► room, indices ─► append, gather      update(layer i) ─► append, gather
                                                            the last one    ─► progress

The pool has the model's layers, in their order, and its dtype. Models whose layers are all full attention; several
sequences of one batch have one length. One thread at a time.
"""
from __future__ import annotations

import array
import ctypes
import secrets
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from . import _abi, _views
from ._append import Step
from .errors import InvalidArgument, Mismatch, check
from .spec import PoolSpec

if TYPE_CHECKING:
    from .pool import Pool
    from .sequence import Sequence


class Handle(NamedTuple):
    """A generation on its way to another process: plain values, to be sent by whatever means."""

    pool: str
    keys: tuple[int, ...]
    length: int


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


class _Rows:
    """The batch: its sequences, the planes, and the forward pass under way."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.layers = pool.layers
        self.seqs: list[Sequence] = []
        self.lengths = [0] * pool.layers
        self._planes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._step = Step()
        self._appended = pool.layers  # of the pass under way; all: none is
        self._start = self._tokens = 0
        self._places: tuple[torch.Tensor, torch.Tensor] | None = None

    def open(self, batch: int) -> None:
        self.seqs = self.pool.open_many([secrets.randbits(64) for _ in range(batch)])

    def _stream(self) -> int:
        return _views.current_stream() if self.pool.info.cuda else 0

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._planes:
            self._take_planes()
        self._check(layer, keys, values)
        if layer == 0:
            self._begin(keys)
        self._append(layer, keys, values)
        self.lengths[layer] += self._tokens
        self._appended = layer + 1
        if self._appended == self.layers:
            check(_abi.library().kvp_progress(self._step.pointer, self._stream()))
            for seq in self.seqs:
                seq.note_enqueued(self.lengths[0])
        assert self._places is not None
        pages, offsets = self._places
        return self._gather(layer, 0, pages, offsets), self._gather(layer, 1, pages, offsets)

    def _take_planes(self) -> None:
        order = self.pool.info.spec.order
        for layer in range(self.layers):
            k, v = (torch.from_dlpack(plane) for plane in self.pool.layer(layer))
            self._planes.append((k, v) if order == "NHD" else (k.transpose(1, 2), v.transpose(1, 2)))

    def _check(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer >= self.layers:
            raise InvalidArgument(f"layer {layer} is none of the {self.layers} of pool {self.pool.name}")
        if layer and (layer != self._appended or keys.shape[2] != self._tokens):
            raise Mismatch(f"layer {layer} is updated behind {self._appended}, in a pass of {self._tokens} tokens")
        for given, plane, what in zip((keys, values), self._planes[layer], ("keys", "values")):
            if (given.dtype, given.device, given.shape[1], given.shape[3]) != (
                    plane.dtype, plane.device, plane.shape[2], plane.shape[3]):
                raise InvalidArgument(
                    f"{what} are {list(given.shape)} of {given.dtype} on {given.device}; pool {self.pool.name} holds "
                    f"[batch, {plane.shape[2]}, tokens, {plane.shape[3]}] of {plane.dtype} on {plane.device}")
        if self.seqs and keys.shape[0] != len(self.seqs):
            raise InvalidArgument(f"a batch of {keys.shape[0]}; the cache holds {len(self.seqs)} sequences")

    def _begin(self, keys: torch.Tensor) -> None:
        """Room and indices for a pass, over all layers."""
        if self._appended != self.layers:
            raise Mismatch(f"a pass begins behind one that ended at layer {self._appended} of {self.layers}")
        if not self.seqs:
            self.open(keys.shape[0])
        n, start, tokens, page = len(self.seqs), self.lengths[0], keys.shape[2], self.pool.page_size
        self.pool.make_room(self.seqs, [start + tokens] * n)
        pages = -(-(start + tokens) // page)
        table = [list(seq.page_ids()[:pages]) for seq in self.seqs]
        pointer = self._step.fit(self.pool, n, max(n * tokens, 1), max(n * pages, 1))
        wires = array.array("Q", [seq.wire for seq in self.seqs])
        counts, starts = array.array("I", [tokens] * n), array.array("I", [start] * n)
        check(_abi.library().kvp_step_begin(pointer, n, _views.address(wires), _views.address(counts),
                                            _views.address(starts), self._stream()))
        position = torch.arange(start + tokens, device=keys.device)
        ids = torch.tensor(table, dtype=torch.int64).to(keys.device, non_blocking=True)
        self._places = ids[:, position // page], (position % page).expand(n, -1)
        self._start, self._tokens, self._appended = start, tokens, 0

    def _append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        kept, views = [], []
        for given in (keys, values):
            flat = given.transpose(1, 2).reshape(-1, given.shape[1], given.shape[3])
            if flat.stride(2) != 1:
                flat = flat.contiguous()
            kept.append(flat)
            size = flat.element_size()
            views.append(_abi.TokenView(flat.data_ptr(), flat.stride(0) * size, flat.stride(1) * size))
        first = self.pool.plane_index(layer, "k")
        if self.pool.plane_index(layer, "v") != first + 1:
            raise InvalidArgument(f"V of layer {layer} is not behind its K in pool {self.pool.name}")
        if self._tokens:
            sources = (_abi.TokenView * 2)(*views)
            check(_abi.library().kvp_append(self._step.pointer, first, 2, ctypes.addressof(sources), self._stream()))

    def _gather(self, layer: int, which: int, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self._planes[layer][which][pages, offsets].transpose(1, 2).contiguous()

    def whole(self) -> None:
        """Between passes, and all of it written: calls of the daemon's may count on the lengths."""
        if self._appended != self.layers:
            raise Mismatch(f"a pass has ended at layer {self._appended} of {self.layers}")
        if self.pool.info.cuda:
            check(_abi.library().kvp_stream_sync(self.pool.pointer, 0, self._stream()))

    def crop(self, length: int) -> None:
        self.whole()
        self.pool.advance(self.seqs, [length] * len(self.seqs), truncate=True)
        self.lengths = [length] * self.layers

    def select(self, rows: list[int]) -> None:
        """Row i becomes what row rows[i] is: kept where it is used once, forked where it is used again, else given
        up."""
        if not self.seqs or rows == list(range(len(self.seqs))):
            return
        self.whole()
        first: dict[int, int] = {}
        again = [i for i, row in enumerate(rows) if first.setdefault(row, i) != i]
        unused = [seq for row, seq in enumerate(self.seqs) if row not in first]
        chosen = [self.seqs[row] for row in rows]
        if again:
            children = self.pool.fork([chosen[i] for i in again], [secrets.randbits(64) for _ in again])
            for i, child in zip(again, children):
                child.note_enqueued(self.lengths[0])
                chosen[i] = child
        self.pool.close_sequences(unused)
        self.seqs = chosen

    def take(self, handle: Handle) -> None:
        self.seqs = self.pool.open_many(handle.keys)
        self.lengths = [handle.length] * self.layers
        for seq in self.seqs:
            if seq.written != handle.length:
                raise Mismatch(f"sequence {seq.slot}.{seq.generation} has {seq.written} tokens, not {handle.length}")

    def give(self, to: int) -> Handle:
        self.whole()
        handle = Handle(self.pool.name, tuple(seq.key for seq in self.seqs), self.lengths[0])
        self.pool.transfer(self.seqs, to)
        self._forget()
        return handle

    def _forget(self) -> None:
        self.seqs = []
        self.lengths = [0] * self.layers
        self._appended = self.layers
        self._places = None

    def reset(self) -> None:
        self.pool.close_sequences(self.seqs)
        self._forget()

    def end(self) -> None:
        self.reset()
        self._planes = []
        self._step.end()


class KVPoolLayer(CacheLayerMixin):  # type: ignore[misc]
    """A layer of a `KVPoolCache`. What concerns all layers at once is asked of the cache."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, rows: _Rows, index: int) -> None:
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
        self._rows = _Rows(pool)
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
