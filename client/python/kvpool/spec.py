"""What a pool is to be, and how the daemon describes one: `PoolSpec`, `PlaneSpec`, `PoolInfo`."""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, NamedTuple

from . import _abi
from ._arguments import U64, integer, text
from .errors import InvalidArgument


class PlaneSpec(NamedTuple):
    """One layer's K, V or MLA component: `heads` heads of `dim` elements a token."""

    layer: int
    component: str
    """"k", "v", "ckv" or "kpe"."""
    heads: int
    dim: int
    dtype: str = "float16"
    """"float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2" or "uint8"."""


class TenantShare(NamedTuple):
    """What a user (by uid) may have of a pool, and what others leave it."""

    tenant: int
    quota_pages: int = 0
    """It has no more, cached pages included; 0: no limit."""
    guaranteed_pages: int = 0
    """Others evict none of its pages when it has no more."""


class PoolSpec(NamedTuple):
    """A pool: `pages` pages of `page_size` tokens of every layer.

    Its planes are said in one of three ways:

    - standard attention: `layers`, `kv_heads`, `head_dim` (and `v_head_dim`, where V's differs);
    - MLA: `layers`, `ckv_dim`, `kpe_dim`;
    - each by itself: `planes`.
    """

    name: str
    pages: int
    page_size: int
    layers: int = 1
    kv_heads: int | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    ckv_dim: int | None = None
    kpe_dim: int | None = None
    dtype: str = "float16"
    planes: tuple[PlaneSpec, ...] = ()
    order: str = "NHD"
    """"NHD": a page is [token, head, dim]; "HND": [head, token, dim]."""
    placement: str = "layer"
    """"layer": each plane one tensor; "page": all planes of a page lie together."""
    joined: bool = False
    """K and V of a layer in one [pages, 2, ...] tensor; MLA's two in one [pages, token, ckv + kpe]."""
    reserved_pages: int = 0
    """Pages 0..n-1 are never handed out."""
    max_sequences: int = 0
    """0: 1024."""
    max_sequence_tokens: int = 0
    """0: what the pool holds, at most 131 072."""
    model: str = ""
    """Identity of the model; an attach may ask for it."""
    devices: tuple[str, ...] = ()
    """UUIDs of the GPUs, one slab on each; none: the first GPU, or the host."""
    region_bytes: int = 0
    """Room for regions (`Pool.region`) behind the pages of each slab."""
    linger_ms: int = 0
    """How long durable sequences of a dead session wait for a claim."""
    policy: str = "adaptive"
    """Which cached page leaves first: "adaptive" or "lru"."""
    block_hash: str = "keyed"
    """Of blocks' tokens: "keyed", or "xxh3", with which the pool is one user's alone."""
    zero_on_reuse: bool = True
    """Zero a page that comes to another user."""
    tenants: tuple[TenantShare, ...] = ()
    """Who is not named has no quota and no guarantee."""
    page_digests: bool = False
    """Keep a digest of each full page's bytes, which `kvpool audit --digests` compares."""

    def all_planes(self) -> tuple[PlaneSpec, ...]:
        """The planes, in the order of their indices. Raises InvalidArgument where the spec says none, or two ways."""
        standard = self.kv_heads is not None and self.head_dim is not None
        mla = self.ckv_dim is not None and self.kpe_dim is not None
        if standard + mla + bool(self.planes) != 1:
            raise InvalidArgument(
                f"pool {self.name} needs its planes said in one way: kv_heads and head_dim, ckv_dim and kpe_dim, "
                "or planes"
            )
        if self.planes:
            return self.planes
        integer("layers", self.layers, _abi.PLANES_MAX, 1)
        if standard:
            value_dim = self.v_head_dim if self.v_head_dim is not None else self.head_dim
            shape = (("k", self.kv_heads, self.head_dim), ("v", self.kv_heads, value_dim))
        else:
            shape = (("ckv", 1, self.ckv_dim), ("kpe", 1, self.kpe_dim))
        return tuple(
            PlaneSpec(layer, component, heads or 0, dim or 0, self.dtype)
            for layer in range(self.layers)
            for component, heads, dim in shape
        )


class TenantUse(NamedTuple):
    """What a user has of a pool."""

    tenant: int
    pages: int
    """In use, cached ones included."""
    cached_pages: int
    quota_pages: int
    guaranteed_pages: int


class CacheInfo(NamedTuple):
    """The prefix cache of a pool; totals count from its making."""

    published_pages: int
    """Known by their blocks."""
    cached_pages: int
    """Of these, held by nobody: they leave when pages are needed."""
    dirty_pages: int
    """Came from another user, and are about to be zeroed."""
    pins: int
    lookup_blocks: int
    """Asked for when sequences were opened ..."""
    hit_blocks: int
    """... and found."""
    publishes: int
    evictions: int
    tenants: tuple[TenantUse, ...]


class PoolInfo(NamedTuple):
    """A pool as the daemon described it; the counts are of that moment."""

    spec: PoolSpec
    """With every default filled in, and `planes` listed."""
    layout_digest: tuple[int, int]
    slabs: int
    slab_bytes: int
    page_bytes: int
    pool_id: int
    row_pages: int
    free_pages: int
    sequences: int
    retiring_sequences: int
    quarantined_sequences: int
    quarantined_pages: int
    attachments: int
    cuda: bool
    lost: bool
    deleting: bool
    cache: CacheInfo


def _code(table: dict[int, str], what: str, value: str) -> int:
    for code, name in table.items():
        if name == value:
            return code
    raise InvalidArgument(f"{what} {value!r} is none of {', '.join(table.values())}")


def dtype_code(name: str) -> int:
    """enum kvp_dtype of a dtype's name. Raises InvalidArgument."""
    code = _abi.DTYPE_CODES.get(name)
    if code is None:
        raise InvalidArgument(f"dtype {name!r} is none of {', '.join(_abi.DTYPE_CODES)}")
    return code


def to_c(spec: PoolSpec) -> tuple[_abi.PoolSpec, Any]:
    """The struct, and what must live as long as it."""
    planes = spec.all_planes()
    array = (_abi.PlaneSpec * max(len(planes), 1))()
    for entry, plane in zip(array, planes):
        entry.layer = integer("layer", plane.layer)
        entry.component = _code(_abi.COMPONENTS, "component", plane.component)
        entry.heads = integer("heads", plane.heads)
        entry.dim = integer("dim", plane.dim)
        entry.dtype = dtype_code(plane.dtype)
    uuids = (spec.devices,) if isinstance(spec.devices, str) else spec.devices
    devices = (ctypes.c_char_p * max(len(uuids), 1))(*[text("device", uuid) for uuid in uuids])
    tenants = (_abi.TenantShare * max(len(spec.tenants), 1))(
        *[_abi.TenantShare(*map(integer, TenantShare._fields, share)) for share in spec.tenants]
    )
    made = _abi.PoolSpec(
        name=text("name", spec.name),
        model=text("model", spec.model),
        reserved_pages=integer("reserved_pages", spec.reserved_pages),
        max_sequences=integer("max_sequences", spec.max_sequences),
        max_sequence_tokens=integer("max_sequence_tokens", spec.max_sequence_tokens),
        devices=devices,
        n_devices=len(uuids),
        region_bytes=integer("region_bytes", spec.region_bytes, U64),
        linger_ms=integer("linger_ms", spec.linger_ms),
        policy=_code(_abi.POLICIES, "policy", spec.policy),
        block_hash=_code(_abi.BLOCK_HASHES, "block_hash", spec.block_hash),
        zero_on_reuse=_abi.ZERO_ON if spec.zero_on_reuse else _abi.ZERO_OFF,
        tenants=tenants,
        n_tenants=len(spec.tenants),
        page_digests=bool(spec.page_digests),
    )
    made.layout = _abi.LayoutSpec(
        pages=integer("pages", spec.pages),
        page_tokens=integer("page_size", spec.page_size),
        n_planes=len(planes),
        order=_code(_abi.ORDERS, "order", spec.order),
        placement=_code(_abi.PLACEMENTS, "placement", spec.placement),
        joined=bool(spec.joined),
        planes=array,
    )
    return made, (array, devices, tenants)


def _planes(layout: _abi.LayoutSpec) -> Iterable[PlaneSpec]:
    for plane in layout.planes[: layout.n_planes]:
        yield PlaneSpec(
            plane.layer, _abi.COMPONENTS[plane.component], plane.heads, plane.dim, _abi.DTYPES[plane.dtype][0]
        )


def _cache(cache: _abi.CacheInfo) -> CacheInfo:
    return CacheInfo(
        **{name: getattr(cache, name) for name in CacheInfo._fields if name != "tenants"},
        tenants=tuple(TenantUse(**{name: getattr(use, name) for name in TenantUse._fields})
                      for use in cache.tenants[: cache.n_tenants]),
    )


def info_from_c(info: _abi.PoolInfo) -> PoolInfo:
    """A copy that holds nothing of the struct."""
    layout = info.spec.layout
    planes = tuple(_planes(layout))
    spec = PoolSpec(
        name=info.spec.name.decode(),
        pages=layout.pages,
        page_size=layout.page_tokens,
        layers=1 + max(plane.layer for plane in planes),
        dtype=planes[0].dtype,
        planes=planes,
        order=_abi.ORDERS[layout.order],
        placement=_abi.PLACEMENTS[layout.placement],
        joined=bool(layout.joined),
        reserved_pages=info.spec.reserved_pages,
        max_sequences=info.spec.max_sequences,
        max_sequence_tokens=info.spec.max_sequence_tokens,
        model=(info.spec.model or b"").decode(errors="replace"),
        devices=tuple(device.decode() for device in info.spec.devices[: info.spec.n_devices]),
        region_bytes=info.spec.region_bytes,
        linger_ms=info.spec.linger_ms,
        policy=_abi.POLICIES[info.spec.policy],
        block_hash=_abi.BLOCK_HASHES[info.spec.block_hash],
        zero_on_reuse=info.spec.zero_on_reuse != _abi.ZERO_OFF,
        tenants=tuple(TenantShare(share.tenant, share.quota_pages, share.guaranteed_pages)
                      for share in info.spec.tenants[: info.spec.n_tenants]),
        page_digests=info.spec.page_digests,
    )
    return PoolInfo(
        spec=spec,
        layout_digest=(info.layout_digest[0], info.layout_digest[1]),
        cache=_cache(info.cache),
        **{
            name: getattr(info, name)
            for name in (
                "slabs", "slab_bytes", "page_bytes", "pool_id", "row_pages", "free_pages", "sequences",
                "retiring_sequences", "quarantined_sequences", "quarantined_pages", "attachments", "cuda", "lost",
                "deleting",
            )
        },
    )
