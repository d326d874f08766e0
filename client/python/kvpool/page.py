"""FlashInfer's page functions, on kvpool's kernels: `append_paged_kv_cache`, `append_paged_mla_kv_cache`,
`get_batch_indices_positions`, `get_seq_lens`.

Over torch tensors, on the host or on a CUDA device (enqueued on torch's current stream), and over numpy arrays; over
any cache that can be said in strides, a pool's planes among them; with or without a daemon. Each function takes two
forms:

- FlashInfer's own: a CSR page table (kv_indptr [batch + 1], kv_indices, kv_last_page_len [batch] after the append);
- a table of rows: page_table [batch, columns], last_page_len [batch] *before* the append, page_size. A row's pages are
  its leading ids that are not negative; what it holds is (pages - 1) * page_size + last_page_len tokens.

A negative batch index or position is padding, and skipped. A page id, position or batch index that is out of range is
skipped, and nothing is written outside the cache: on the host BadIndex is raised then, behind the rest; on CUDA, where
nobody waits for the kernel, nothing is raised.

torch.compile takes all of them, over tensors, with fullgraph=True too: in the graph they are operators of torch, which
change their cache in place and nothing else. The compiler knows memory by its tensor: what is appended to one is to be
read by it or a view of it, not by another tensor that was made of the same plane. For mode="reduce-overhead", and its
CUDA graphs, mark the caches with torch._dynamo.mark_static_address.
"""
from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, overload

from . import _abi, _views
from ._arguments import integer
from .errors import BadIndex, InvalidArgument, NoDevice, check

_INT32_MAX = (1 << 31) - 1

# ---- launching -----------------------------------------------------------------------------------------------------


def _run(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args); where torch.compile reads this for its graph, the operator of that name."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling() and all(map(_is_traceable, args)):
        from . import _operators

        return getattr(_operators, work.__name__.lstrip("_"))(*args)
    return work(*args)


def _is_traceable(argument: Any) -> bool:
    """A tensor or several, or no array at all: torch.compile can not look into other arrays."""
    if isinstance(argument, (list, tuple)):
        return all(map(_views.is_torch, argument))
    return argument is None or isinstance(argument, (int, str)) or _views.is_torch(argument)


def _launch(operation: str, args: Any, device: tuple[int, int]) -> None:
    """Run kvp_host_X or kvp_cuda_X over a struct of arguments."""
    library = _abi.library()
    if device[0] == _views.HOST:
        ring = _abi.ErrorRing(capacity=1)
        args.errors = ctypes.addressof(ring)
        check(getattr(library, f"kvp_host_{operation}")(ctypes.byref(args), 0))
        if ring.count:
            first = ring.records[0]
            raise BadIndex(f"{operation} skipped {ring.count}: entry {first.token} has the "
                           f"{_abi.VIOLATIONS.get(first.kind, 'index')} {first.value}, which has no place")
        return
    name = f"kvp_cuda_{operation}"
    if not hasattr(library, name):
        raise NoDevice("this libkvpool was built without CUDA")
    torch: Any = sys.modules["torch"]
    with torch.cuda.device(device[1]):
        check(getattr(library, name)(ctypes.byref(args), _views.current_stream(device[1])))


def _plane(seen: _views.View, page: int, token: int, head: int | None, what: str) -> _abi.PlaneView:
    """A cache's view as the kernels take it; the arguments are which dimension is which, the last is the elements'."""
    if min(seen.shape) < 1:
        raise InvalidArgument(f"{what} is {list(seen.shape)}; no dimension may be 0")
    if min(seen.strides) <= 0 and any(n > 1 and stride <= 0 for n, stride in zip(seen.shape, seen.strides)):
        raise InvalidArgument(f"the strides of {what} are {list(seen.strides)} bytes; they must be positive")
    if seen.shape[-1] > 1 and seen.strides[-1] != seen.itemsize:
        raise InvalidArgument(f"the last dimension of {what} is not dense")
    code = _abi.DTYPE_CODES.get(seen.dtype)
    dim = seen.shape[-1]
    if code is None or _abi.DTYPES[code][1] != seen.itemsize:
        code, dim = _abi.DTYPE_CODES["uint8"], dim * seen.itemsize
    return _abi.PlaneView(
        base=seen.pointer, page_stride=seen.strides[page], token_stride=seen.strides[token],
        head_stride=seen.strides[head] if head is not None else 0,
        heads=seen.shape[head] if head is not None else 1, dim=dim, dtype=code)


def _source(value: Any, cache: _views.View, shape: tuple[int, ...], what: str) -> tuple[_views.View, Any]:
    """What is appended, checked against its cache."""
    seen, kept = _views.dense(value, what)
    if seen.shape[1:] != shape:
        raise InvalidArgument(f"{what} is {list(seen.shape)}; the cache holds {list(shape)} a token")
    if seen.dtype != cache.dtype:
        raise InvalidArgument(f"{what} is of {seen.dtype}, the cache of {cache.dtype}")
    return seen, kept


def _append(planes: list[_abi.PlaneView], sources: list[_views.View], pages: int, page_size: int,
            at: _abi.Address, device: tuple[int, int]) -> None:
    n = len(planes)
    plane_array = (_abi.PlaneView * n)(*planes)
    token_array = (_abi.TokenView * n)(
        *[_abi.TokenView(seen.pointer, seen.strides[0], seen.strides[1] if len(seen.shape) == 3 else 0)
          for seen in sources])
    args = _abi.AppendArgs(planes=ctypes.addressof(plane_array), sources=ctypes.addressof(token_array), n_planes=n,
                           pages=pages, page_tokens=page_size, at=at)
    _launch("append", args, device)


def _one_length(names: str, sizes: list[int]) -> int:
    if len(set(sizes)) != 1:
        raise InvalidArgument(f"{names} are of {', '.join(map(str, sizes))} entries; they must agree")
    return sizes[0]


def _csr(nnz: int, page: int, batch_indices: Any, positions: Any, kv_indices: Any,
         kv_indptr: Any) -> tuple[_abi.Address, list[_views.View], Any]:
    """Where `nnz` tokens go, into pages of `page` tokens; the arrays that say so, and what must live as long."""
    bits, views, kept = _views.indices((("batch_indices", batch_indices), ("positions", positions),
                                        ("kv_indices", kv_indices), ("kv_indptr", kv_indptr)))
    _one_length("tokens, batch_indices and positions", [nnz, views[0].shape[0], views[1].shape[0]])
    listed, batch = views[2].shape[0], views[3].shape[0] - 1
    if batch < 0:
        raise InvalidArgument("kv_indptr is empty; it has an entry more than there are sequences")
    if nnz and views[3].device[0] == _views.HOST and int(kept[3].max()) > listed:
        raise InvalidArgument(f"kv_indptr goes up to {int(kept[3].max())}; kv_indices has {listed} entries")
    at = _abi.Address(
        kind=_abi.ADDRESS_CSR, index_bits=bits, nnz=nnz, batch=batch if listed else 0, batch_indices=views[0].pointer,
        positions=views[1].pointer, kv_indices=views[2].pointer or views[3].pointer, kv_indptr=views[3].pointer)
    return at, views, kept


def _table(nnz: int, page: int, page_table: Any, last_page_len: Any,
           page_size: int) -> tuple[_abi.Address, list[_views.View], Any]:
    """The same, one token a row, behind what the row holds."""
    if page_size != page:
        raise InvalidArgument(f"page_size {page_size}; the cache has pages of {page} tokens")
    bits, (table, last), kept = _views.indices((("page_table", page_table), ("last_page_len", last_page_len)),
                                              table=True)
    if table.shape[1] < 1:
        raise InvalidArgument(f"page_table is {list(table.shape)}; it must be [batch, columns]")
    _one_length("tokens, rows and last_page_len", [nnz, table.shape[0], last.shape[0]])
    rows, lens = kept
    if _views.is_torch(rows):
        torch = sys.modules["torch"]
        held = (rows >= 0).to(rows.dtype).cumprod(1).sum(1, dtype=rows.dtype)
        batch = torch.arange(nnz, dtype=rows.dtype, device=rows.device)
        positions = (held - 1).clamp(min=0) * page_size + lens
    else:
        numpy = sys.modules["numpy"]
        held = numpy.cumprod(rows >= 0, axis=1).sum(axis=1, dtype=rows.dtype)
        batch = numpy.arange(nnz, dtype=rows.dtype)
        positions = numpy.maximum(held - 1, 0) * page_size + lens
    places = [_views.view(batch, "batch"), _views.view(positions, "positions")]
    at = _abi.Address(
        kind=_abi.ADDRESS_TABLE, index_bits=bits, nnz=nnz, batch=nnz, batch_indices=places[0].pointer,
        positions=places[1].pointer, page_table=table.pointer, page_table_stride=table.shape[1],
        page_table_pages=table.shape[1])
    return at, [table, last], (kept, batch, positions)


# ---- append --------------------------------------------------------------------------------------------------------


def _arrays(cache: Any) -> list[Any]:
    """A cache's arrays: of a pair two, or one [pages, 2, ...]."""
    if not isinstance(cache, (tuple, list)):
        return [cache]
    if len(cache) != 2:
        raise InvalidArgument(f"a cache of {len(cache)} arrays; it is a pair of K and V, or one array")
    return list(cache)


def _pair(caches: list[Any]) -> tuple[_views.View, _views.View]:
    """K and V of a cache's arrays."""
    if len(caches) == 2:
        pair = _views.target(caches[0], "the K cache"), _views.target(caches[1], "the V cache")
    else:
        both = _views.target(caches[0], "the cache")
        if len(both.shape) != 5 or both.shape[1] != 2:
            raise InvalidArgument(f"the cache is {list(both.shape)}; it must be [pages, 2, ...] of 5 dimensions")
        key = both._replace(shape=(both.shape[0], *both.shape[2:]), strides=(both.strides[0], *both.strides[2:]))
        pair = key, key._replace(pointer=key.pointer + both.strides[1])
    if any(len(half.shape) != 4 for half in pair) or pair[0].shape[0] != pair[1].shape[0]:
        raise InvalidArgument(f"the caches are {list(pair[0].shape)} and {list(pair[1].shape)}; they must be "
                              "4-dimensional, and have the same pages")
    return pair


@overload
def append_paged_kv_cache(append_key: Any, append_value: Any, batch_indices: Any, positions: Any,
                          paged_kv_cache: Any, kv_indices: Any, kv_indptr: Any, kv_last_page_len: Any,
                          kv_layout: str = "NHD") -> None: ...
@overload
def append_paged_kv_cache(append_key: Any, append_value: Any, kv_cache: Any, page_table: Any, last_page_len: Any,
                          page_size: int, /, *, kv_layout: str = "NHD") -> None: ...
def append_paged_kv_cache(append_key: Any, append_value: Any, batch_indices: Any, positions: Any,
                          paged_kv_cache: Any, kv_indices: Any, kv_indptr: Any = None, kv_last_page_len: Any = None,
                          kv_layout: str = "NHD") -> None:
    """Store K and V of new tokens into a paged cache.

    FlashInfer's form: `append_key` and `append_value` [nnz, heads, dim]; `batch_indices`, `positions` [nnz] say whose
    token each is and where it goes; `paged_kv_cache` a pair of [pages, page_size, heads, dim] ("NHD") or [pages, heads,
    page_size, dim] ("HND"), or one [pages, 2, ...]; `kv_indices`, `kv_indptr` the page table.

    Rows' form, by position: (k [batch, heads, dim], v, kv_cache, page_table [batch, columns], last_page_len [batch],
    page_size): token b goes behind what row b holds.

    K and V may differ in dim and strides; any dim, any page size, any dtype, their cache's. Raises InvalidArgument,
    and BadIndex as the module says.
    """
    if kv_layout not in ("NHD", "HND"):
        raise InvalidArgument(f"kv_layout {kv_layout!r} is none of NHD, HND")
    if kv_indptr is None:
        _run(_append_rows, append_key, append_value, _arrays(batch_indices), positions, paged_kv_cache,
             _page_size(kv_indices, "kv_indices"), kv_layout)
    else:
        _run(_append_csr, append_key, append_value, _arrays(paged_kv_cache), batch_indices, positions, kv_indices,
             kv_indptr, kv_layout)


def _page_size(value: Any, what: str) -> int:
    """Of the rows' form, which has no kv_indptr."""
    if isinstance(value, int):  # a symbol, too, where torch.compile reads this
        return value
    return integer(f"page_size, or {what} without kv_indptr,", value)


def _append_csr(key: Any, value: Any, caches: list[Any], batch_indices: Any, positions: Any, kv_indices: Any,
                kv_indptr: Any, kv_layout: str) -> None:
    _append_kv(key, value, caches, kv_layout, _csr, batch_indices, positions, kv_indices, kv_indptr)


def _append_rows(key: Any, value: Any, caches: list[Any], page_table: Any, last_page_len: Any, page_size: int,
                 kv_layout: str) -> None:
    _append_kv(key, value, caches, kv_layout, _table, page_table, last_page_len, page_size)


def _append_kv(key: Any, value: Any, caches: list[Any], kv_layout: str, address: Callable[..., Any],
               *where: Any) -> None:
    token, head = (1, 2) if kv_layout == "NHD" else (2, 1)
    pair = _pair(caches)
    found = [_source(given, cache, (cache.shape[head], cache.shape[3]), what)
             for given, cache, what in zip((key, value), pair, ("the appended K", "the appended V"))]
    sources = [seen for seen, _ in found]
    nnz = _one_length("K and V", [seen.shape[0] for seen in sources])
    page_size = _one_length("the pages of K and V", [cache.shape[token] for cache in pair])
    at, used, _kept = address(nnz, page_size, *where)
    device = _views.same_device([*pair, *sources, *used])
    if nnz:
        planes = [_plane(cache, 0, token, head, "the cache") for cache in pair]
        _append(planes, sources, pair[0].shape[0], page_size, at, device)


@overload
def append_paged_mla_kv_cache(append_ckv: Any, append_kpe: Any, batch_indices: Any, positions: Any, ckv_cache: Any,
                              kpe_cache: Any, kv_indices: Any, kv_indptr: Any, kv_last_page_len: Any) -> None: ...
@overload
def append_paged_mla_kv_cache(append_ckv: Any, append_kpe: Any, kv_cache: Any, page_table: Any, last_page_len: Any,
                              page_size: int, /) -> None: ...
def append_paged_mla_kv_cache(append_ckv: Any, append_kpe: Any, batch_indices: Any, positions: Any, ckv_cache: Any,
                              kpe_cache: Any, kv_indices: Any = None, kv_indptr: Any = None,
                              kv_last_page_len: Any = None) -> None:
    """Store the compressed K/V and the rotary part of new tokens into a paged MLA cache.

    FlashInfer's form: `append_ckv` [nnz, ckv], `append_kpe` [nnz, kpe] into `ckv_cache` [pages, page_size, ckv] and
    `kpe_cache` [pages, page_size, kpe], which may be slices of one joined cache; either pair may be None. The rest as
    in `append_paged_kv_cache`. Any widths.

    Rows' form, by position: (k [batch, heads, dim], v, kv_cache [pages, page_size, heads, 2 * dim], page_table,
    last_page_len, page_size): K into the first half of each head, V into the second.
    """
    if kv_indptr is None:
        _run(_append_mla_rows, append_ckv, append_kpe, [batch_indices], positions, ckv_cache,
             _page_size(kpe_cache, "kpe_cache"))
        return
    for value, cache, what in ((append_ckv, ckv_cache, "ckv"), (append_kpe, kpe_cache, "kpe")):
        if (value is None) != (cache is None):
            raise InvalidArgument(f"of {what} there is only {'the cache' if value is None else 'what is appended'}")
    caches = [cache for cache in (ckv_cache, kpe_cache) if cache is not None]
    if not caches:
        raise InvalidArgument("there is no cache to append to")
    _run(_append_mla_csr, append_ckv, append_kpe, caches, batch_indices, positions, kv_indices, kv_indptr)


def _append_mla_csr(ckv: Any, kpe: Any, given: list[Any], batch_indices: Any, positions: Any, kv_indices: Any,
                    kv_indptr: Any) -> None:
    planes, sources, kept, caches = [], [], [], []
    values = [(value, what) for value, what in ((ckv, "ckv"), (kpe, "kpe")) if value is not None]
    for (value, what), cache in zip(values, given):
        seen = _views.target(cache, f"the cache of {what}")
        if len(seen.shape) != 3:
            raise InvalidArgument(f"the cache of {what} is {list(seen.shape)}; it must be [pages, page_size, {what}]")
        source, alive = _source(value, seen, (seen.shape[2],), f"the appended {what}")
        planes.append(_plane(seen, 0, 1, None, f"the cache of {what}"))
        caches.append(seen)
        sources.append(source)
        kept.append(alive)
    pages = _one_length("the caches", [seen.shape[0] for seen in caches])
    page_size = _one_length("the pages of ckv and kpe", [seen.shape[1] for seen in caches])
    nnz = _one_length("ckv and kpe", [seen.shape[0] for seen in sources])
    at, used, _kept = _csr(nnz, page_size, batch_indices, positions, kv_indices, kv_indptr)
    device = _views.same_device([*caches, *sources, *used])
    if nnz:
        _append(planes, sources, pages, page_size, at, device)


def _append_mla_rows(key: Any, value: Any, caches: list[Any], page_table: Any, last_page_len: Any,
                     page_size: int) -> None:
    seen = _views.target(caches[0], "the cache")
    if len(seen.shape) != 4 or seen.shape[3] % 2:
        raise InvalidArgument(f"the cache is {list(seen.shape)}; it must be [pages, page_size, heads, 2 * dim]")
    dim = seen.shape[3] // 2
    half = seen._replace(shape=(*seen.shape[:3], dim))
    halves = [half, half._replace(pointer=half.pointer + dim * seen.itemsize)]
    found = [_source(part, half, (seen.shape[2], dim), what) for part, what in ((key, "K"), (value, "V"))]
    sources = [source for source, _ in found]
    nnz = _one_length("K and V", [source.shape[0] for source in sources])
    at, used, _kept = _table(nnz, seen.shape[1], page_table, last_page_len, page_size)
    device = _views.same_device([seen, *sources, *used])
    if nnz:
        planes = [_plane(part, 0, 1, 2, "the cache") for part in halves]
        _append(planes, sources, seen.shape[0], page_size, at, device)


# ---- indices -------------------------------------------------------------------------------------------------------


def _is_table(value: Any) -> bool:
    if not hasattr(value, "ndim"):
        raise TypeError(f"the page table is a {type(value).__name__}; it must be a torch tensor or a numpy array")
    return bool(value.ndim == 2)


def _lengths(args: _abi.IndexArgs, like: Any, dtype: str, device: tuple[int, int]) -> Any:
    lens = _views.empty(like, args.batch, dtype)
    args.ret_seq_lens = _views.view(lens, "lengths").pointer
    if args.batch:
        _launch("index", args, device)
    return lens


def _index_args(source: int, bits: int, page_size: int, batch: int) -> _abi.IndexArgs:
    return _abi.IndexArgs(source=source, index_bits=bits, slot_bits=64, pages=_abi.PAGES_MAX, page_tokens=page_size,
                          batch=batch)


def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """How many tokens each sequence holds, [batch]: max(pages - 1, 0) * page_size + last_page_len.

    `kv_indptr` [batch + 1], or a page table [batch, columns] in its place.
    """
    return _run(_seq_lens, kv_indptr, kv_last_page_len, page_size)


def _seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    rows = _is_table(kv_indptr)
    bits, (table, last), kept = _views.indices((("the page table", kv_indptr), ("last_page_len", kv_last_page_len)),
                                              table=rows)
    page_size = integer("page_size", page_size, _abi.PAGE_TOKENS_MAX, 1)
    batch = _one_length("sequences and last_page_len", [table.shape[0] - (not rows), last.shape[0]])
    if rows and table.shape[1] < 1:
        raise InvalidArgument(f"page_table is {list(table.shape)}; it must be [batch, columns]")
    if batch > _abi.INDEX_BATCH_MAX:
        held = (kept[0] >= 0).cumprod(1).sum(1) if rows else kept[0][1:] - kept[0][:-1]
        lens = (held - 1).clip(0) * page_size + kept[1] * (held > 0)
        return lens.to(kept[0].dtype) if _views.is_torch(lens) else lens.astype(kept[0].dtype)
    device = _views.same_device([table, last])
    if rows:
        args = _index_args(_abi.INDEX_TABLE, bits, page_size, batch)
        args.in_page_table = table.pointer
        args.in_page_table_stride = args.in_page_table_pages = table.shape[1]
    else:
        args = _index_args(_abi.INDEX_CSR, bits, page_size, batch)
        args.in_kv_indptr = table.pointer
    args.in_last_page_len = last.pointer
    return _lengths(args, kept[0], f"int{bits}", device)


def get_batch_indices_positions(append_indptr: Any, seq_lens: Any, nnz: int, batch_indices: Any = None,
                                positions: Any = None) -> tuple[Any, Any]:
    """Whose token each of a ragged batch is, and its position there: batch_indices and positions, int32 [nnz].

    FlashInfer's form: `append_indptr` [batch + 1], `seq_lens` [batch] after the append; entries behind the last token
    are padding, -1 and 0. Outputs may be given (int32).

    Rows' form, by position: (page_table [batch, columns], last_page_len [batch], page_size): of every token that the
    rows hold. As many as there are is read from the device.
    """
    if _is_table(append_indptr):
        lens = get_seq_lens(append_indptr, seq_lens, nnz)
        if _views.is_torch(lens):
            zero = lens.new_zeros(1)
            indptr = sys.modules["torch"].cat([zero, lens.cumsum(0, dtype=lens.dtype)])
        else:
            numpy = sys.modules["numpy"]
            indptr = numpy.concatenate([numpy.zeros(1, lens.dtype), lens.cumsum(dtype=lens.dtype)])
        append_indptr, seq_lens, nnz = indptr, lens, int(indptr[-1])
    if not isinstance(nnz, int) or nnz < 0:
        nnz = integer("nnz", nnz)
    batch_indices, positions = (_views.empty(append_indptr, nnz, "int32") if given is None else given
                                for given in (batch_indices, positions))
    _run(_batch_indices, append_indptr, seq_lens, nnz, batch_indices, positions)
    return batch_indices, positions


def _batch_indices(append_indptr: Any, seq_lens: Any, nnz: int, batch_indices: Any, positions: Any) -> None:
    bits, (ends, after), kept = _views.indices((("append_indptr", append_indptr), ("seq_lens", seq_lens)))
    if bits != 32:
        most = max([0, *(int(value.max()) for value, seen in zip(kept, (ends, after))
                         if seen.device[0] == _views.HOST and seen.shape[0])])
        integer("a length in append_indptr or seq_lens", most, _INT32_MAX)
        kept = [value.int() if _views.is_torch(value) else value.astype("int32") for value in kept]
        ends, after = _views.view(kept[0], "append_indptr"), _views.view(kept[1], "seq_lens")
    batch = _one_length("sequences and seq_lens", [ends.shape[0] - 1, after.shape[0]])
    outputs = [_output(batch_indices, nnz, "batch_indices"), _output(positions, nnz, "positions")]
    if batch > _abi.INDEX_BATCH_MAX:
        _search(kept[0], kept[1], nnz, batch_indices, positions)
        return
    start = kept[1] - (kept[0][1:] - kept[0][:-1])
    slots = start * 0
    device = _views.same_device([ends, after, *outputs])
    args = _index_args(_abi.INDEX_ROWS, 32, _abi.PAGE_TOKENS_MAX, batch)
    args.nnz = nnz
    args.append_indptr = ends.pointer
    args.start_lengths = _views.view(start, "start").pointer
    args.seq_slots = _views.view(slots, "slots").pointer
    # Rows of no ids, as long as rows can be: nothing is asked that would read them.
    args.table = _abi.Rows(rows=args.seq_slots, row_stride=4 * _abi.PAGES_MAX, max_sequences=1,
                           row_pages=_abi.PAGES_MAX)
    args.ret_batch_indices, args.ret_positions = (output.pointer for output in outputs)
    if nnz:
        _launch("index", args, device)


def _output(given: Any, nnz: int, what: str) -> _views.View:
    seen = _views.target(given, what)
    _check_output(seen.shape, seen.dtype, nnz < 2 or seen.strides == (4,), nnz, what)
    return seen


def _check_output(shape: tuple[int, ...], dtype: str, dense: bool, nnz: int, what: str) -> None:
    if dtype != "int32" or shape != (nnz,) or not dense:
        raise InvalidArgument(f"{what} is {list(shape)} of {dtype}; it must be a dense [{nnz}] of int32")


def _search(indptr: Any, lens: Any, nnz: int, batch_indices: Any, positions: Any) -> None:
    """Batches over what one launch takes."""
    if _views.is_torch(indptr):
        torch = sys.modules["torch"]
        token = torch.arange(nnz, dtype=torch.int32, device=indptr.device)
        found = torch.searchsorted(indptr, token, right=True).to(torch.int32) - 1
        where = torch.where
    else:
        numpy = sys.modules["numpy"]
        token = numpy.arange(nnz, dtype="int32")
        found = numpy.searchsorted(indptr, token, side="right").astype("int32") - 1
        where = numpy.where
    inside = token < indptr[-1]
    sequence = where(inside, found, 0)
    batch_indices[:] = where(inside, found, -1)
    positions[:] = where(inside, token + lens[sequence] - indptr[sequence + 1], 0)
