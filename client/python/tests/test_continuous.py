"""kvpool.hf.continuous where there is no GPU: what it refuses. test_continuous_gpu.py has it generate."""
from __future__ import annotations

import unittest

from support import HAS_HF, PoolTest

import kvpool


def has_continuous() -> bool:
    from kvpool.hf import continuous

    try:
        continuous._module()
    except kvpool.NotServed:
        return False
    return True


@unittest.skipUnless(HAS_HF and has_continuous(), "transformers with continuous batching is not installed")
class Refused(PoolTest):
    def test_a_pool_in_host_memory_is_refused_and_nothing_is_installed(self) -> None:
        from kvpool.hf import continuous

        before = continuous._module().PagedAttentionCache
        with self.assertRaises(kvpool.InvalidArgument):
            continuous.install(self.pool())
        self.assertIs(continuous._module().PagedAttentionCache, before)

    def test_a_second_install_is_Busy_until_the_first_is_removed(self) -> None:
        from unittest import mock

        from kvpool.hf import continuous

        module, pool = continuous._module(), self.pool(region_bytes=1 << 20)
        before = module.PagedAttentionCache
        with mock.patch.object(pool, "info", pool.info._replace(cuda=True)):
            with continuous.install(pool) as first:
                ours = module.PagedAttentionCache
                with self.assertRaises(kvpool.Busy):
                    continuous.install(pool, tag="other")
                self.assertIs(module.PagedAttentionCache, ours)
            first.remove()
            with continuous.install(pool):
                self.assertIsNot(module.PagedAttentionCache, ours)
        self.assertIs(module.PagedAttentionCache, before)
        with self.assertRaisesRegex(kvpool.InvalidArgument, "NoneType is no kvpool.Pool"):
            continuous.install(None)

    def test_a_transformers_without_it_is_NotServed(self) -> None:
        from unittest import mock

        from kvpool.hf import continuous

        with mock.patch.object(continuous._module(), "PagedAttentionCache", None), \
                self.assertRaises(kvpool.NotServed):
            continuous.install(self.pool())


if __name__ == "__main__":
    unittest.main()
