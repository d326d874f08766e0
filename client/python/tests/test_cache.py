"""The prefix cache: prompts named by tokens or keys, taken along, asked for, kept, evicted, listed."""
from __future__ import annotations

import array
import os
import unittest

from support import PoolTest, needs_numpy, needs_torch

import kvpool

PROMPT = [100 + 3 * i for i in range(19)]  # 4 pages of 4, and a part
TOKEN_BYTES = 2 * 8 * 2


class Cache(PoolTest):
    def tearDown(self) -> None:
        for name in self.made:
            self.client.attach(name).evict()
        super().tearDown()

    def written(self, pool: kvpool.Pool, key: str = "first", **named) -> kvpool.Sequence:
        """A sequence with the prompt's tokens, whose bytes are of another process's writing: by call."""
        named = named or {"tokens": PROMPT}
        seq = pool.open(key, **named)
        seq.reserve(len(PROMPT))
        seq.publish(**named)
        return seq

    def fill(self, pool: kvpool.Pool, seq: kvpool.Sequence, tokens: int) -> None:
        import numpy

        data = numpy.arange(tokens * TOKEN_BYTES // 2, dtype="<f2").reshape(tokens, 2, 8)
        seq.append(data, data + 1)

    @needs_numpy
    def test_a_prompt_is_taken_along_by_its_tokens(self) -> None:
        pool = self.pool()
        with self.written(pool) as seq:
            self.assertEqual((seq.cached, len(seq), pool.match(PROMPT)), (0, 0, 0))
            self.fill(pool, seq, len(PROMPT))
            self.assertEqual((pool.client.describe(pool.name).sequences, len(seq)), (1, 19))
        self.assertEqual((pool.match(PROMPT), pool.match(PROMPT[:9]), pool.match([1, *PROMPT])), (16, 8, 0))
        with pool.open("second", tokens=PROMPT) as seq:
            self.assertEqual((seq.cached, len(seq), seq.reserved, len(seq.pages)), (16, 16, 16, 4))
            self.assertIs(pool.open("second", tokens=PROMPT), seq)
            self.assertEqual(seq.cached, 16)
        info = pool.client.describe(pool.name)
        self.assertEqual((info.cache.cached_pages, info.cache.hit_blocks, info.cache.lookup_blocks), (4, 4, 8))
        self.assertEqual(info.cache.tenants, (kvpool.TenantUse(os.getuid(), 4, 4, 0, 0),))

    @needs_numpy
    def test_keys_of_an_engine_and_extra_name_blocks_of_their_own(self) -> None:
        pool = self.pool()
        keys = [bytes([i]) * 32 for i in range(4)]
        with self.written(pool, blocks=keys, extra=b"lora") as seq:
            self.fill(pool, seq, 16)
        self.assertEqual(pool.match(blocks=keys, extra=b"lora"), 16)
        self.assertEqual((pool.match(blocks=keys), pool.match(PROMPT)), (0, 0))

    @needs_numpy
    def test_a_batch_names_what_its_pages_will_hold(self) -> None:
        pool = self.pool()
        one, two = pool.open_many(["a", "b"], tokens=[PROMPT, []])
        pool.advance([one, two], [19, 8], tokens=[PROMPT, PROMPT[:8]])
        self.fill(pool, one, 16)
        self.assertEqual(pool.seq_lens([one, two]).tolist(), [16, 0])
        pool.advance([one], [24], tokens=[[7, 8, 9, 10]], first=[4])
        self.fill(pool, one, 4)
        self.assertEqual(one.info().written, 20)  # by call: now the daemon knows, too
        three, four = pool.open_many(["c", "d"], tokens=[[*PROMPT[:16], 7, 8, 9, 10], PROMPT[:5]])
        self.assertEqual((three.cached, four.cached, three.pages[:4]), (20, 4, one.pages[:4]))
        with self.assertRaises(kvpool.Mismatch):
            pool.advance([one], [24], tokens=[[7, 8, 9, 11]], first=[4])
        with self.assertRaises(kvpool.InvalidArgument):
            one.publish([1, 2, 3, 4], first=9)

    @needs_numpy
    def test_pins_keep_and_evict_lets_go(self) -> None:
        pool = self.pool(policy="lru")
        with self.written(pool) as seq:
            self.fill(pool, seq, len(PROMPT))
        self.assertEqual(pool.pin(PROMPT[:8]), 8)
        self.assertEqual((pool.evict(1), pool.evict(), pool.evict()), (1, 1, 0))
        self.assertEqual(pool.match(PROMPT), 8)
        self.assertEqual((pool.unpin(PROMPT[:8]), pool.unpin(PROMPT[:8])), (8, 0))
        self.assertEqual((pool.evict(tokens=PROMPT), pool.match(PROMPT), pool.free_pages), (2, 0, 32))
        with self.assertRaises(kvpool.NotFound):
            pool.pin(PROMPT)

    @needs_numpy
    def test_cached_pages_are_listed_with_their_parents(self) -> None:
        pool = self.pool()
        with self.written(pool) as seq:
            self.fill(pool, seq, len(PROMPT))
            pages = seq.pages
        listed = {page.page: page for page in pool.list_cache()}
        self.assertEqual([listed[page].parent for page in pages[:4]], [-1, *pages[:3]])
        self.assertEqual([listed[page].children for page in pages[:4]], [1, 1, 1, 0])
        self.assertEqual({(len(page.key), page.references, page.tenant) for page in listed.values()},
                         {(16, 0, os.getuid())})

    @needs_numpy
    def test_tokens_may_be_arrays(self) -> None:
        import numpy

        pool = self.pool()
        with self.written(pool, tokens=numpy.asarray(PROMPT)) as seq:
            self.fill(pool, seq, 16)
        self.assertEqual((pool.open("x", tokens=array.array("i", PROMPT)).cached, pool.match(tuple(PROMPT))), (16, 16))

    @needs_torch
    def test_tokens_may_be_tensors(self) -> None:
        import torch

        pool = self.pool()
        with self.written(pool, tokens=torch.tensor(PROMPT)) as seq:
            self.fill(pool, seq, 16)
        self.assertEqual(pool.open("x", tokens=torch.tensor(PROMPT)).cached, 16)

    def test_what_can_not_name_blocks_is_refused(self) -> None:
        pool = self.pool()
        for call in (lambda: pool.open("a", tokens=[-1]), lambda: pool.open("a", tokens=[1 << 32]),
                     lambda: pool.open("a", tokens=["one"]), lambda: pool.open("a", blocks=[b"1234567"]),
                     lambda: pool.open("a", blocks=[b"12345678", b"123456789"]),
                     lambda: pool.open("a", tokens=[1], blocks=[b"12345678"]), lambda: pool.open("a", extra=b"lora"),
                     lambda: pool.open("a", tokens=[1], extra=bytes(4097)), lambda: pool.match(),
                     lambda: pool.open_many(["a", "b"], tokens=[[1]]), lambda: pool.evict(0),
                     lambda: pool.evict(3, tokens=PROMPT), lambda: pool.pin(PROMPT, lease_ms=5)):
            with self.assertRaises(kvpool.InvalidArgument):
                call()
        self.assertEqual(list(pool.sequences()), [])

    def test_a_pool_is_made_with_policy_hash_and_shares(self) -> None:
        share = kvpool.TenantShare(os.getuid(), quota_pages=6, guaranteed_pages=2)
        pool = self.pool(policy="lru", block_hash="xxh3", zero_on_reuse=False, tenants=(share,))
        spec = pool.info.spec
        self.assertEqual((spec.policy, spec.block_hash, spec.zero_on_reuse, spec.tenants),
                         ("lru", "xxh3", False, (share,)))
        with self.assertRaises(kvpool.OutOfPages) as raised, pool.open("a") as seq:
            seq.reserve(7 * 4)
        self.assertIn(f"tenant {os.getuid()} has a quota of 6 pages", str(raised.exception))
        with self.assertRaises(kvpool.InvalidArgument):
            self.client.create_pool(kvpool.PoolSpec("x", 4, 4, kv_heads=1, head_dim=8, policy="fifo"))


if __name__ == "__main__":
    unittest.main()
