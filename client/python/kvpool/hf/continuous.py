"""transformers' continuous batching on kvpool's memory: `install`.

    with kvpool.hf.continuous.install(pool):
        model.generate_batch(inputs, continuous_batching_config=ContinuousBatchingConfig(num_blocks=512))

Its paged cache chooses its blocks itself; what it is given is memory: the tensors that it makes of K and V lie in
regions of the pool, which the daemon owns (`kvpool.torch.use_pool`): "kv_cache/0", "kv_cache/1", …; of a second cache
that lives beside the first "kv_cache-1/0", …. The pool's `region_bytes` bound it: say `num_blocks`, since what
transformers takes otherwise is what the GPU has free. A cache that does not fit raises LimitReached.
"""
from __future__ import annotations

import itertools
import weakref
from types import TracebackType
from typing import Any

from ..errors import Busy, InvalidArgument, NotServed
from ..pool import Pool


def _module() -> Any:
    """Where the installed transformers makes its paged cache. Raises NotServed where it does not."""
    import transformers

    try:
        from transformers.generation.continuous_batching import continuous_api
    except ImportError:
        continuous_api = None
    if not isinstance(getattr(continuous_api, "PagedAttentionCache", None), type):
        raise NotServed(f"transformers {transformers.__version__} has no continuous batching of the kind that is known")
    return continuous_api


def _on_pool(stock: type, pool: Pool, tag: str, preserve: bool) -> type:
    from ..torch import use_pool

    alive: dict[int, weakref.ref[Any]] = {}

    def take(cache: Any) -> str:
        """The tag of the first number that no living cache has."""
        number = next(number for number in itertools.count() if number not in alive or alive[number]() is None)
        alive[number] = weakref.ref(cache)
        return f"{tag}-{number}" if number else tag

    class KVPoolPagedAttentionCache(stock):  # type: ignore[misc]
        """transformers' paged cache, its tensors in a region of a kvpool pool."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with use_pool(pool, take(self), preserve):
                super().__init__(*args, **kwargs)

    return KVPoolPagedAttentionCache


class Installed:
    """An `install` in force; a context manager, removed at the end of its block. Caches that were made stay as they
    are."""

    def __init__(self, module: Any, stock: type, ours: type) -> None:
        self._module, self._stock, self._ours = module, stock, ours
        module.PagedAttentionCache = ours

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.remove()

    def remove(self) -> None:
        """Paged caches that are made from now on are transformers' own. Again is fine."""
        if self._module.PagedAttentionCache is self._ours:
            self._module.PagedAttentionCache = self._stock


def install(pool: Pool, *, tag: str = "kv_cache", preserve: bool = False) -> Installed:
    """Let continuous batching of this process make its paged caches in regions of `pool`, a CUDA pool with
    `region_bytes`. `preserve`: the bytes of regions that survived an earlier process are kept.

    Raises NotServed where the installed transformers has no continuous batching of the kind that is known,
    InvalidArgument of a pool in host memory or without room for regions, Busy while another install is in force.
    """
    module = _module()
    if not isinstance(pool, Pool):
        raise InvalidArgument(f"{type(pool).__name__} is no kvpool.Pool: Client.attach and create_pool give one")
    if not pool.info.cuda:
        raise InvalidArgument(f"pool {pool.name} is in host memory; continuous batching's tensors are on a GPU")
    if not pool.info.spec.region_bytes:
        raise InvalidArgument(f"pool {pool.name} has no room for regions: its region_bytes is 0")
    stock = module.PagedAttentionCache
    if stock.__module__ == __name__:
        raise Busy("an install is in force in this process: its caches are made in one pool; remove() it first")
    return Installed(module, stock, _on_pool(stock, pool, tag, preserve))
