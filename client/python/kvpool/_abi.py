"""libkvpool as ctypes sees it: the structs and functions of kvpool.h and kvp_kernels.h that this package uses.

Nothing here has behaviour; tests/test_abi.py compiles the headers and compares every size, offset, constant and
argument count with this file. Pointers are `c_void_p` throughout: what they point to is said in kvpool.h.

The library is looked for once, at its first use: $KVPOOL_LIBRARY, then beside this file (a wheel carries it there),
then by the system's linker.
"""
from __future__ import annotations

import ctypes
import functools
import os
from ctypes import (
    Structure,
    c_bool,
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import Any

LIBRARY_NAME = "libkvpool.so.0"

PLANES_MAX = 1024
BATCH_MAX = 1024
INDEX_BATCH_MAX = 4096
PAGES_MAX = 1 << 25
PAGE_TOKENS_MAX = 4096
SEQUENCE_TOKENS_MAX = 1 << 24
TIMELINES_MAX = 16
DLPACK_DIMS_MAX = 8
PINS_MAX = 1024
TENANTS_MAX = 64
BLOCK_KEY_BYTES_MIN = 8
BLOCK_KEY_BYTES_MAX = 32
BLOCK_EXTRA_BYTES_MAX = 4096
DURABLE = 1
TRUNCATE = 2
REGION_EXCLUSIVE = 1
REGION_KEEP = 2
TORCH_PRESERVE = 1
ADDRESS_CSR = 1
ADDRESS_SLOTS = 2
ADDRESS_TABLE = 4
INDEX_ROWS = 1
INDEX_CSR = 2
INDEX_TABLE = 3

# name, bytes of an element, DLPack's (code, bits), numpy's typestr or ""
DTYPES: dict[int, tuple[str, int, tuple[int, int], str]] = {
    1: ("float32", 4, (2, 32), "<f4"),
    2: ("float16", 2, (2, 16), "<f2"),
    3: ("bfloat16", 2, (4, 16), ""),
    4: ("float8_e4m3fn", 1, (10, 8), ""),
    5: ("float8_e5m2", 1, (12, 8), ""),
    6: ("uint8", 1, (1, 8), "|u1"),
}
DTYPE_CODES = {entry[0]: code for code, entry in DTYPES.items()}
COMPONENTS = {1: "k", 2: "v", 3: "ckv", 4: "kpe"}
COMPONENT_CODES = {name: code for code, name in COMPONENTS.items()}
ORDERS = {1: "NHD", 2: "HND"}
PLACEMENTS = {1: "layer", 2: "page"}
POLICIES = {0: "adaptive", 1: "lru"}
BLOCK_HASHES = {0: "keyed", 1: "xxh3"}
ZERO_ON = 1
ZERO_OFF = 2
SEQUENCE_STATES = {1: "open", 2: "retiring", 3: "quarantined", 4: "lingering", 5: "busy"}
VIOLATIONS = {1: "page id", 2: "position", 3: "batch index", 4: "slot", 5: "row version", 6: "capacity"}


class Seq(Structure):
    slot: int
    generation: int
    _fields_ = [("slot", c_uint32), ("generation", c_uint32)]


class Point(Structure):
    timeline: int
    value: int
    _fields_ = [("timeline", c_uint32), ("value", c_uint64)]


class ConnectOptions(Structure):
    _fields_ = [("connect_ms", c_uint32), ("reconnect_ms", c_uint32), ("call_ms", c_uint32), ("session", c_char_p)]


class SessionInfo(Structure):
    session_id: int
    epoch: int
    token: bytes
    _fields_ = [
        ("session_id", c_uint64),
        ("epoch", c_uint64),
        ("instance", c_uint8 * 16),
        ("token", c_char * 96),
        ("resume_secret", c_uint8 * 64),
        ("resume_secret_bytes", c_uint32),
        ("lease_ms", c_uint32),
        ("version", c_char * 32),
    ]


class PlaneSpec(Structure):
    layer: int
    component: int
    heads: int
    dim: int
    dtype: int
    _fields_ = [(name, c_uint32) for name in ("layer", "component", "heads", "dim", "dtype")]


class LayoutSpec(Structure):
    pages: int
    page_tokens: int
    n_planes: int
    order: int
    placement: int
    joined: int
    planes: Any
    _fields_ = [
        ("pages", c_uint32),
        ("page_tokens", c_uint32),
        ("n_planes", c_uint32),
        ("order", c_uint32),
        ("placement", c_uint32),
        ("joined", c_uint32),
        ("planes", ctypes.POINTER(PlaneSpec)),
    ]


class PlaneLayout(Structure):
    offset: int
    page_stride: int
    token_stride: int
    head_stride: int
    _fields_ = [(name, c_uint64) for name in ("offset", "page_stride", "token_stride", "head_stride")]


class TenantShare(Structure):
    tenant: int
    quota_pages: int
    guaranteed_pages: int
    _fields_ = [(name, c_uint32) for name in ("tenant", "quota_pages", "guaranteed_pages")]


class TenantUse(Structure):
    tenant: int
    pages: int
    cached_pages: int
    quota_pages: int
    guaranteed_pages: int
    _fields_ = [
        (name, c_uint32) for name in ("tenant", "pages", "cached_pages", "quota_pages", "guaranteed_pages")
    ]


class CacheInfo(Structure):
    published_pages: int
    cached_pages: int
    dirty_pages: int
    pins: int
    lookup_blocks: int
    hit_blocks: int
    publishes: int
    evictions: int
    tenants: Any
    n_tenants: int
    _fields_ = [
        ("published_pages", c_uint32),
        ("cached_pages", c_uint32),
        ("dirty_pages", c_uint32),
        ("pins", c_uint32),
        ("lookup_blocks", c_uint64),
        ("hit_blocks", c_uint64),
        ("publishes", c_uint64),
        ("evictions", c_uint64),
        ("tenants", ctypes.POINTER(TenantUse)),
        ("n_tenants", c_uint32),
    ]


class Blocks(Structure):
    counts: int | None
    first: int | None
    tokens: int | None
    keys: int | None
    extra: int | None
    extra_bytes: int
    key_bytes: int
    _fields_ = [
        ("counts", c_void_p),
        ("first", c_void_p),
        ("tokens", c_void_p),
        ("keys", c_void_p),
        ("extra", c_void_p),
        ("extra_bytes", ctypes.c_size_t),
        ("key_bytes", c_uint32),
    ]


class CachedPage(Structure):
    key: Any
    page: int
    parent: int
    children: int
    references: int
    tenant: int
    hits: int
    age: int
    _fields_ = [
        ("key", c_uint8 * 16),
        ("page", c_int32),
        ("parent", c_int32),
        ("children", c_uint32),
        ("references", c_uint32),
        ("tenant", c_uint32),
        ("hits", c_uint32),
        ("age", c_uint32),
    ]


class PoolSpec(Structure):
    name: bytes
    model: bytes | None
    layout: LayoutSpec
    reserved_pages: int
    max_sequences: int
    max_sequence_tokens: int
    devices: Any
    n_devices: int
    legacy_ipc: bool
    region_bytes: int
    linger_ms: int
    policy: int
    block_hash: int
    zero_on_reuse: int
    tenants: Any
    n_tenants: int
    page_digests: bool
    _fields_ = [
        ("name", c_char_p),
        ("model", c_char_p),
        ("layout", LayoutSpec),
        ("reserved_pages", c_uint32),
        ("max_sequences", c_uint32),
        ("max_sequence_tokens", c_uint32),
        ("devices", ctypes.POINTER(c_char_p)),
        ("n_devices", c_uint32),
        ("legacy_ipc", c_bool),
        ("region_bytes", c_uint64),
        ("linger_ms", c_uint32),
        ("policy", c_uint32),
        ("block_hash", c_uint32),
        ("zero_on_reuse", c_uint32),
        ("tenants", ctypes.POINTER(TenantShare)),
        ("n_tenants", c_uint32),
        ("page_digests", c_bool),
    ]


class PoolInfo(Structure):
    spec: PoolSpec
    planes: Any
    layout_digest: Any
    slabs: int
    slab_bytes: int
    page_bytes: int
    pool_id: int
    row_pages: int
    free_pages: int
    sequences: int
    retiring_sequences: int
    quarantined_sequences: int
    attachments: int
    quarantined_pages: int
    cuda: bool
    lost: bool
    deleting: bool
    cache: CacheInfo
    _fields_ = [
        ("spec", PoolSpec),
        ("planes", ctypes.POINTER(PlaneLayout)),
        ("layout_digest", c_uint64 * 2),
        ("slabs", c_uint32),
        ("slab_bytes", c_uint64),
        ("page_bytes", c_uint64),
        ("pool_id", c_uint64),
        ("row_pages", c_uint32),
        ("free_pages", c_uint32),
        ("sequences", c_uint32),
        ("retiring_sequences", c_uint32),
        ("quarantined_sequences", c_uint32),
        ("attachments", c_uint32),
        ("quarantined_pages", c_uint64),
        ("cuda", c_bool),
        ("lost", c_bool),
        ("deleting", c_bool),
        ("cache", CacheInfo),
    ]


class AttachOptions(Structure):
    layout_digest: Any
    model: bytes | None
    join: int
    ranks: int
    metadata_only: bool
    _fields_ = [
        ("layout_digest", ctypes.POINTER(c_uint64)),
        ("model", c_char_p),
        ("join", c_uint64),
        ("ranks", c_uint32),
        ("metadata_only", c_bool),
    ]


class PageCopy(Structure):
    source: int
    destination: int
    tokens: int
    _fields_ = [("source", c_int32), ("destination", c_int32), ("tokens", c_uint32), ("reserved", c_uint32)]


class SeqInfo(Structure):
    seq: Seq
    key: int
    session_id: int
    reserved: int
    written: int
    version: int
    state: int
    _fields_ = [
        ("seq", Seq),
        ("key", c_uint64),
        ("session_id", c_uint64),
        ("reserved", c_uint32),
        ("written", c_uint32),
        ("version", c_uint32),
        ("state", c_int),
    ]


class PlaneView(Structure):
    base: int
    page_stride: int
    token_stride: int
    head_stride: int
    heads: int
    dim: int
    dtype: int
    _fields_ = [
        ("base", c_void_p),
        ("page_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("heads", c_uint32),
        ("dim", c_uint32),
        ("dtype", c_uint32),
        ("reserved", c_uint32),
    ]


class TokenView(Structure):
    base: int | None
    token_stride: int
    head_stride: int
    _fields_ = [("base", c_void_p), ("token_stride", c_int64), ("head_stride", c_int64)]


class ErrorRecord(Structure):
    kind: int
    token: int
    value: int
    _fields_ = [("kind", c_uint32), ("reserved", c_uint32), ("token", c_int64), ("value", c_int64)]


class ErrorRing(Structure):
    """kvp_error_ring with room for one record."""

    count: int
    capacity: int
    records: Any
    _fields_ = [
        ("count", c_uint64),
        ("capacity", c_uint32),
        ("reserved", c_uint32),
        ("records", ErrorRecord * 1),
    ]


class Rows(Structure):
    heads: int | None
    rows: int | None
    row_stride: int
    max_sequences: int
    row_pages: int
    _fields_ = [
        ("heads", c_void_p),
        ("rows", c_void_p),
        ("row_stride", c_uint64),
        ("max_sequences", c_uint32),
        ("row_pages", c_uint32),
    ]


class Address(Structure):
    kind: int
    index_bits: int
    nnz: int
    slot_mapping: int | None
    batch_indices: int | None
    positions: int | None
    batch: int
    kv_indptr: int | None
    kv_indices: int | None
    page_table: int | None
    page_table_stride: int
    page_table_pages: int
    _fields_ = [
        ("kind", c_uint32),
        ("index_bits", c_uint32),
        ("nnz", c_int64),
        ("nnz_device", c_void_p),
        ("batch_indices", c_void_p),
        ("positions", c_void_p),
        ("batch", c_int64),
        ("kv_indptr", c_void_p),
        ("kv_indices", c_void_p),
        ("slot_mapping", c_void_p),
        ("page_table", c_void_p),
        ("page_table_stride", c_int64),
        ("page_table_pages", c_int64),
        ("table", Rows),
        ("seq_slots", c_void_p),
        ("append_indptr", c_void_p),
        ("start_lengths", c_void_p),
        ("row_counts", c_void_p),
        ("row_versions", c_void_p),
    ]


class AppendArgs(Structure):
    planes: Any
    sources: Any
    n_planes: int
    pages: int
    page_tokens: int
    at: Address
    errors: int | None
    _fields_ = [
        ("planes", c_void_p),
        ("sources", c_void_p),
        ("n_planes", c_uint32),
        ("pages", c_uint32),
        ("page_tokens", c_uint32),
        ("n_copies", c_uint32),
        ("copies", c_void_p),
        ("at", Address),
        ("errors", c_void_p),
    ]


class GatherArgs(Structure):
    planes: int | None
    destinations: int | None
    n_planes: int
    pages: int
    page_tokens: int
    at: Address
    errors: int | None
    _fields_ = [
        ("planes", c_void_p),
        ("destinations", c_void_p),
        ("n_planes", c_uint32),
        ("pages", c_uint32),
        ("page_tokens", c_uint32),
        ("dtype", c_uint32),
        ("scale_mode", c_uint32),
        ("reserved", c_uint32),
        ("scales", c_void_p),
        ("scale_planes", c_void_p),
        ("at", Address),
        ("errors", c_void_p),
    ]


class IndexArgs(Structure):
    source: int
    index_bits: int
    slot_bits: int
    pages: int
    page_tokens: int
    all_tokens: int
    batch: int
    nnz: int
    append_indptr: int | None
    table: Rows
    seq_slots: int | None
    start_lengths: int | None
    in_kv_indptr: int | None
    in_last_page_len: int | None
    in_page_table: int | None
    in_page_table_stride: int
    in_page_table_pages: int
    ret_seq_lens: int | None
    ret_batch_indices: int | None
    ret_positions: int | None
    errors: int | None
    _fields_ = [
        ("source", c_uint32),
        ("index_bits", c_uint32),
        ("slot_bits", c_uint32),
        ("pages", c_uint32),
        ("page_tokens", c_uint32),
        ("all_tokens", c_uint32),
        ("batch", c_int64),
        ("nnz", c_int64),
        ("kv_capacity", c_int64),
        ("batch_device", c_void_p),
        ("append_lengths", c_void_p),
        ("append_indptr", c_void_p),
        ("append_each", c_int64),
        ("table", Rows),
        ("seq_slots", c_void_p),
        ("start_lengths", c_void_p),
        ("progress", c_void_p),
        ("row_counts", c_void_p),
        ("row_versions", c_void_p),
        ("in_kv_indptr", c_void_p),
        ("in_kv_indices", c_void_p),
        ("in_last_page_len", c_void_p),
        ("in_page_table", c_void_p),
        ("in_page_table_stride", c_int64),
        ("in_page_table_pages", c_int64),
        ("in_page_counts", c_void_p),
        ("ret_seq_lens", c_void_p),
        ("ret_kv_indptr", c_void_p),
        ("ret_kv_indices", c_void_p),
        ("ret_kv_last_page_len", c_void_p),
        ("ret_append_indptr", c_void_p),
        ("ret_batch_indices", c_void_p),
        ("ret_positions", c_void_p),
        ("ret_slot_mapping", c_void_p),
        ("ret_nnz", c_void_p),
        ("errors", c_void_p),
    ]


class Region(Structure):
    address: int
    offset: int
    bytes: int
    existed: bool
    _fields_ = [("address", c_void_p), ("offset", c_uint64), ("bytes", c_uint64), ("existed", c_bool)]


class RegionInfo(Structure):
    name: bytes
    rank: int
    tenant: int
    mapped: int
    offset: int
    bytes: int
    _fields_ = [
        ("name", c_char_p),
        ("rank", c_uint32),
        ("tenant", c_uint32),
        ("mapped", c_uint32),
        ("offset", c_uint64),
        ("bytes", c_uint64),
    ]


class DlpackTensor(Structure):
    data: int
    device_type: int
    device_id: int
    ndim: int
    code: int
    bits: int
    shape: Any
    strides: Any
    _fields_ = [
        ("data", c_void_p),
        ("device_type", c_int32),
        ("device_id", c_int32),
        ("ndim", c_uint32),
        ("code", c_uint8),
        ("bits", c_uint8),
        ("reserved", c_uint16),
        ("shape", c_int64 * DLPACK_DIMS_MAX),
        ("strides", c_int64 * DLPACK_DIMS_MAX),
    ]


# Each struct by its name in C.
STRUCTS: dict[str, type[Structure]] = {
    "kvp_seq": Seq,
    "kvp_point": Point,
    "kvp_connect_options": ConnectOptions,
    "kvp_session_info": SessionInfo,
    "kvp_plane_spec": PlaneSpec,
    "kvp_layout_spec": LayoutSpec,
    "kvp_plane_layout": PlaneLayout,
    "kvp_tenant_share": TenantShare,
    "kvp_tenant_use": TenantUse,
    "kvp_cache_info": CacheInfo,
    "kvp_blocks": Blocks,
    "kvp_cached_page": CachedPage,
    "kvp_pool_spec": PoolSpec,
    "kvp_pool_info": PoolInfo,
    "kvp_attach_options": AttachOptions,
    "kvp_page_copy": PageCopy,
    "kvp_seq_info": SeqInfo,
    "kvp_plane_view": PlaneView,
    "kvp_token_view": TokenView,
    "kvp_error_record": ErrorRecord,
    "kvp_rows": Rows,
    "kvp_address": Address,
    "kvp_append_args": AppendArgs,
    "kvp_gather_args": GatherArgs,
    "kvp_index_args": IndexArgs,
    "kvp_region": Region,
    "kvp_region_info": RegionInfo,
    "kvp_dlpack_tensor": DlpackTensor,
}

_P = c_void_p
_STATUS = c_int

# name: (what it returns, its arguments)
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "kvp_strerror": (c_char_p, [_STATUS]),
    "kvp_error_text": (c_char_p, []),
    "kvp_version": (c_char_p, []),
    "kvp_connect": (_STATUS, [c_char_p, _P, _P]),
    "kvp_session_info": (_STATUS, [_P, _P]),
    "kvp_session_open": (_STATUS, [_P, c_uint32, c_char_p, c_char_p, c_size_t, _P]),
    "kvp_session_close": (_STATUS, [_P, c_char_p]),
    "kvp_pool_create": (_STATUS, [_P, _P, _P]),
    "kvp_pool_describe": (_STATUS, [_P, c_char_p, _P]),
    "kvp_pool_info_free": (None, [_P]),
    "kvp_pool_list": (_STATUS, [_P, _P, _P]),
    "kvp_pool_delete": (_STATUS, [_P, c_char_p]),
    "kvp_attach": (_STATUS, [_P, c_char_p, _P, _P]),
    "kvp_pool_info": (_P, [_P]),
    "kvp_pool_state": (_STATUS, [_P]),
    "kvp_pool_plane": (_STATUS, [_P, c_uint32, c_uint32, _P]),
    "kvp_region_map": (_STATUS, [_P, c_uint32, c_char_p, c_uint64, c_uint, _P]),
    "kvp_region_unmap": (_STATUS, [_P, c_uint32, c_char_p, c_uint]),
    "kvp_region_list": (_STATUS, [_P, c_char_p, _P, _P]),
    "kvp_seq_open_blocks": (_STATUS, [_P, c_uint32, _P, c_uint, _P, _P, _P]),
    "kvp_advance_blocks_begin": (_STATUS, [_P, c_uint32, _P, _P, _P, _P, c_uint, _P]),
    "kvp_match": (_STATUS, [_P, c_char_p, c_uint32, _P, _P, c_uint32, _P]),
    "kvp_pin": (_STATUS, [_P, c_char_p, c_uint32, _P, c_uint32, _P]),
    "kvp_evict": (_STATUS, [_P, c_char_p, c_uint32, c_uint32, _P, c_bool, _P]),
    "kvp_list_cache": (_STATUS, [_P, c_char_p, c_uint32, _P, _P, _P]),
    "kvp_advance_wait": (_STATUS, [_P, _P, _P, _P]),
    "kvp_fork": (_STATUS, [_P, c_uint32, _P, _P, _P, _P, _P, _P, _P]),
    "kvp_transfer": (_STATUS, [_P, c_uint32, _P, c_uint64, _P, _P]),
    "kvp_seq_close": (_STATUS, [_P, c_uint32, _P, _P]),
    "kvp_seq_list": (_STATUS, [_P, c_bool, c_uint32, _P, _P, _P]),
    "kvp_seq_len": (_STATUS, [_P, Seq, _P]),
    "kvp_row": (_STATUS, [_P, Seq, c_uint32, _P, _P]),
    "kvp_seq_lens": (_STATUS, [_P, c_uint32, _P, _P]),
    "kvp_page_table": (_STATUS, [_P, c_uint32, _P, _P, c_uint32, _P, _P, _P, _P]),
    "kvp_batch_indices": (_STATUS, [_P, c_uint32, _P, _P, _P, _P, _P, _P]),
    "kvp_step_create": (_STATUS, [_P, c_uint32, c_uint32, c_uint32, c_uint32, _P]),
    "kvp_step_destroy": (None, [_P]),
    "kvp_step_begin": (_STATUS, [_P, c_uint32, _P, _P, _P, _P]),
    "kvp_append": (_STATUS, [_P, c_uint32, c_uint32, _P, _P]),
    "kvp_progress": (_STATUS, [_P, _P]),
    "kvp_copy_owed": (_STATUS, [_P, c_uint32, _P, _P]),
    "kvp_stream_sync": (_STATUS, [_P, c_uint32, _P]),
    "kvp_timeline_id": (_STATUS, [_P, c_uint32, _P]),
    "kvp_timeline_wait": (_STATUS, [_P, Point, c_uint32]),
    "kvp_timeline_wait_on": (_STATUS, [_P, Point, _P]),
    "kvp_timeline_signal": (_STATUS, [_P, Point, _P]),
    "kvp_owner_of_client": (_STATUS, [_P, _P]),
    "kvp_owner_of_pool": (_STATUS, [_P, _P, _P]),
    "kvp_owner_retain": (None, [_P]),
    "kvp_owner_release": (_STATUS, [_P]),
    "kvp_owner_forever": (None, []),
    "kvp_dlpack_export": (_STATUS, [_P, _P, c_bool, _P]),
    "kvp_dlpack_capsule_end": (None, [_P]),
    "kvp_torch_use": (_STATUS, [_P, c_char_p, c_uint]),
    "kvp_torch_end": (_STATUS, []),
    "kvp_torch_malloc": (_P, [c_size_t, c_int, _P]),
    "kvp_torch_free": (None, [_P, c_size_t, c_int, _P]),
    "kvp_torch_came_back": (c_bool, [_P]),
    "kvp_audit": (_STATUS, [_P, _P, _P, _P]),
    "kvp_host_append": (_STATUS, [_P, c_int]),
    "kvp_host_gather": (_STATUS, [_P, c_int]),
    "kvp_host_index": (_STATUS, [_P, c_int]),
}
# In builds with CUDA only.
CUDA_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "kvp_cuda_append": (_STATUS, [_P, _P]),
    "kvp_cuda_gather": (_STATUS, [_P, _P]),
    "kvp_cuda_index": (_STATUS, [_P, _P]),
}


def _open() -> Any:
    named = os.environ.get("KVPOOL_LIBRARY")
    if named:
        return ctypes.CDLL(named)
    beside = os.path.join(os.path.dirname(__file__), LIBRARY_NAME)
    return ctypes.CDLL(beside if os.path.exists(beside) else LIBRARY_NAME)


@functools.lru_cache(maxsize=1)
def library() -> Any:
    """libkvpool with its functions declared. Raises OSError where it is not to be found."""
    try:
        loaded = _open()
    except OSError as error:
        raise OSError(
            f"libkvpool is not to be found ({error}): install kvpool, or name the library in $KVPOOL_LIBRARY"
        ) from None
    for name, (result, arguments) in (FUNCTIONS | CUDA_FUNCTIONS).items():
        if name in CUDA_FUNCTIONS and not hasattr(loaded, name):
            continue
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded


@functools.lru_cache(maxsize=1)
def libc() -> Any:
    """For the memory that libkvpool hands over."""
    loaded = ctypes.CDLL(None)
    loaded.free.restype = None
    loaded.free.argtypes = [c_void_p]
    return loaded
