"""kvpool: the KV cache that outlives its processes.

    import kvpool

    with kvpool.connect() as client:
        pool = client.create_pool(kvpool.PoolSpec("demo", pages=64, page_size=16, layers=2, kv_heads=4, head_dim=64))
        with pool.open("request-1") as seq:
            seq.append(k, v)                # [layers, tokens, heads, dim], bytes in the pool, no copy kept here
            keys, values = pool.layer(0)    # torch.from_dlpack(keys), numpy.asarray(keys): the pool's own memory

`connect` finds the running service, or starts an embedded daemon for this process. `kvpool.page` has FlashInfer's page
functions on kvpool's kernels, with or without a daemon; they stand here too. `PagedKVCacheManager` is a paged cache by
request id. Errors are classes of `kvpool.errors`, each with the C library's `status`.
"""
from __future__ import annotations

from ._blocks import CachedPage
from .client import Client, SessionInfo, connect
from .errors import (
    AlreadyExists,
    BadIndex,
    Busy,
    DeviceError,
    Disconnected,
    InternalError,
    InvalidArgument,
    KvpoolError,
    LayoutMismatch,
    LedgerCorrupt,
    LimitReached,
    Mismatch,
    NoDevice,
    NotFound,
    NotPermitted,
    NotServed,
    OutOfMemory,
    OutOfPages,
    PoolLost,
    ProtocolError,
    SessionEnded,
    StaleHandle,
    Status,
    TimedOut,
    TryAgain,
)
from .manager import PagedKVCacheManager
from .page import (
    append_paged_kv_cache,
    append_paged_mla_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from .plane import Plane
from .pool import Advance, Pool
from .region import Region, RegionInfo
from .sequence import Point, Sequence, SequenceInfo
from .spec import CacheInfo, PlaneSpec, PoolInfo, PoolSpec, TenantShare, TenantUse

__version__ = "0.1.0"

__all__ = [
    "Advance", "AlreadyExists", "BadIndex", "Busy", "CacheInfo", "CachedPage", "Client", "DeviceError",
    "Disconnected", "InternalError", "InvalidArgument", "KvpoolError", "LayoutMismatch", "LedgerCorrupt",
    "LimitReached", "Mismatch", "NoDevice", "NotFound", "NotPermitted", "NotServed", "OutOfMemory", "OutOfPages",
    "PagedKVCacheManager", "Plane", "PlaneSpec", "Point", "Pool", "PoolInfo", "PoolLost", "PoolSpec",
    "ProtocolError", "Region", "RegionInfo", "Sequence", "SequenceInfo", "SessionEnded", "SessionInfo",
    "StaleHandle", "Status", "TenantShare", "TenantUse", "TimedOut", "TryAgain", "append_paged_kv_cache",
    "append_paged_mla_kv_cache", "connect", "get_batch_indices_positions", "get_seq_lens",
]
