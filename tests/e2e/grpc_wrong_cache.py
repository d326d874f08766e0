"""The wrong calls that concern blocks and the prefix cache, made as those of grpc_wrong.py."""
from grpc_stub import pb

LIST_MAX, LEASE_MS_MIN, LEASE_MS_MAX, EXTRA_MAX = 4096, 100, 24 * 3600 * 1000, 4096


class WrongCache:
    """A part of Wrong."""

    def w_blocks_that_can_not_be(self):
        session, pool = self.session(), self.pool()
        word, blocks = self.random.choice((
            ("must be one or the other", dict(counts=[1], tokens=[1], keys=bytes(16), key_bytes=16)),
            ("must be one or the other", dict(counts=[1], tokens=[1], key_bytes=16)),
            ("key_bytes 7", dict(counts=[1], keys=bytes(7), key_bytes=7)),
            ("key_bytes 33", dict(counts=[1], keys=bytes(33), key_bytes=33)),
            ("key_bytes 0", dict(counts=[1], keys=bytes(8))),
            ("no multiple", dict(counts=[1], keys=bytes(17), key_bytes=16)),
            ("of 2 tokens, but 1", dict(counts=[2], tokens=[1])),
            ("of 4294967295 keys, but 1", dict(counts=[(1 << 32) - 1], keys=bytes(8), key_bytes=8)),
            (f"at most {EXTRA_MAX}", dict(counts=[1], tokens=[1], extra=bytes(EXTRA_MAX + 1))),
            ("must be 0", dict(counts=[1], tokens=[1], first=[1])),
            ("first", dict(counts=[1], tokens=[1], first=[0, 0])),
        ))
        name, fields = self.random.choice((("OpenSequences", dict(keys=[1])), ("Match", {}),
                                           ("Pin", dict(lease_ms=60000)), ("Evict", {})))
        return self.refused(session, name, "KVP_EINVAL", word, pool=pool.name, blocks=pb.Blocks(**blocks), **fields)

    def w_blocks_of_other_lengths(self):
        found = self.owned()
        if not found:
            return False
        session, pool, seqs = found
        n, fields = len(seqs), dict(pool=pool.name, seqs=[seq.handle for seq in seqs])
        counts, first = self.random.choice((([0] * (n + 1), []), ([0] * n, [0] * (n + 1))))
        return self.refused(session, "Advance", "KVP_EINVAL", f"as many as sequences: {n}",
                            reserved=[seq.reserved for seq in seqs],
                            blocks=pb.Blocks(counts=counts, first=first), **fields)

    def w_blocks_behind_what_is_named(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        first = seq.keyed + self.random.randint(1, 5)
        return self.refused(session, "Advance", "KVP_EINVAL", f"only the first {seq.keyed} pages have keys",
                            pool=pool.name, seqs=[seq.handle], reserved=[seq.reserved],
                            blocks=pb.Blocks(counts=[0], first=[first]))

    def w_blocks_of_no_page(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        more = seq.reserved // pool.T + 1
        return self.refused(session, "Advance", "KVP_EINVAL", f"fill {seq.reserved // pool.T} pages", pool=pool.name,
                            seqs=[seq.handle], reserved=[seq.reserved],
                            blocks=pb.Blocks(counts=[more], keys=bytes(16 * more), key_bytes=16))

    def w_other_blocks_than_before(self):
        found = self.owned()
        seqs = [seq for seq in found[2] if seq.keyed > 0 and seq.written >= found[1].T] if found else []
        if not seqs:
            return False
        session, pool, seq = found[0], found[1], seqs[0]
        return self.refused(session, "Advance", "KVP_EMISMATCH", "page 0 of seqs[0]", pool=pool.name,
                            seqs=[seq.handle], reserved=[seq.reserved],
                            blocks=pb.Blocks(counts=[pool.T], tokens=self.random.choices(range(1000), k=pool.T)))

    def w_a_prefix_of_no_block(self):
        pool = self.pool()
        if pool.T == 1:
            return False
        return self.refused(self.session(), "Pin", "KVP_EINVAL", "no whole block", pool=pool.name, lease_ms=60000,
                            blocks=pb.Blocks(counts=[pool.T - 1], tokens=range(pool.T - 1)))

    def w_a_pin_of_what_is_not_there(self):
        pool = self.pool()
        tokens = self.random.choices(range(1 << 20, 1 << 21), k=pool.T)
        return self.refused(self.session(), "Pin", "KVP_ENOENT", "the first 0 are cached", pool=pool.name,
                            lease_ms=60000, blocks=pb.Blocks(counts=[pool.T], tokens=tokens))

    def w_a_pin_that_can_not_be(self):
        pool = self.pool()
        lease_ms = self.random.choice((1, LEASE_MS_MIN - 1, LEASE_MS_MAX + 1, (1 << 32) - 1))
        return self.refused(self.session(), "Pin", "KVP_EINVAL", f"lease_ms: {lease_ms}", pool=pool.name,
                            lease_ms=lease_ms, blocks=pb.Blocks(counts=[pool.T], tokens=range(pool.T)))

    def w_a_call_without_blocks(self):
        name = self.random.choice(("Match", "Pin"))
        fields = dict(lease_ms=60000) if name == "Pin" else {}
        return self.refused(self.session(), name, "KVP_EINVAL", "blocks", pool=self.pool().name, **fields)

    def w_an_eviction_of_two_kinds(self):
        blocks = pb.Blocks(counts=[0])
        word, fields = self.random.choice((("pages: 3", dict(pages=3)), ("all:", dict(all=True))))
        return self.refused(self.session(), "Evict", "KVP_EINVAL", word, pool=self.pool().name, blocks=blocks, **fields)

    def w_a_listing_over_the_limit(self):
        return self.refused(self.session(), "ListCache", "KVP_EINVAL", f"at most {LIST_MAX}", call_id=0,
                            pool=self.pool().name, limit=LIST_MAX + 1)

    def w_a_pool_whose_cache_can_not_be(self):
        share = pb.TenantShare
        word, change = self.random.choice((
            ("policy", dict(policy=99)), ("block_hash", dict(block_hash=99)),
            ("tenants", dict(tenants=[share(tenant=1, quota_pages=2, guaranteed_pages=3)])),
            ("stands twice", dict(tenants=[share(tenant=1, quota_pages=2)] * 2)),
            ("5 pages guaranteed in all", dict(tenants=[share(tenant=1, guaranteed_pages=3),
                                                        share(tenant=2, guaranteed_pages=2)])),
            ("tenants", dict(tenants=[share(tenant=i) for i in range(1, 66)])),
        ))
        plane = pb.Plane(layer=0, component=pb.COMPONENT_K, heads=1, dim=8, dtype=pb.DTYPE_F16)
        spec = pb.PoolSpec(name="new", pages=4, page_tokens=4, planes=[plane], **change)
        return self.refused(self.session(), "CreatePool", "KVP_EINVAL", word, spec=spec)
