"""The wrong calls of the foreign client. Each function makes one: what it sends, the status that must come, and a word
that the text must hold (the field, the value or the limit). None may change anything: the model stays as it is, and the
next right calls and audits would show it. grpc_wrong_cache.py has those that concern the prefix cache.
"""
import collections
import inspect

from grpc_stub import Refused, pb
from grpc_wrong_cache import WrongCache
from naive_pool import Refusal

BATCH_MAX = 1024


class Wrong(WrongCache):
    def __init__(self, world):
        self.world, self.random, self.stub = world, world.random, world.stub
        self.ways = [way for name, way in inspect.getmembers(self, inspect.ismethod) if name.startswith("w_")]
        self.kinds = collections.Counter()

    def one(self):
        """Make one; some need sequences, and are passed over when there are none."""
        for way in self.random.sample(self.ways, len(self.ways)):
            if way() is not False:
                self.kinds[way.__name__] += 1
                return

    # ---- helpers

    def refused(self, session, name, status, word, /, **fields):
        token = session.token if session is not None else ""
        if session is not None:
            session.call_id += 1
            fields.setdefault("call_id", session.call_id)
        refusal = status if isinstance(status, Refusal) else Refusal(status, word)
        self.world.attempt(name, self.stub.request(name, session=token, **fields), refusal)

    def session(self):
        return self.random.choice(self.world.sessions)

    def pool(self):
        return self.random.choice(self.world.pools)

    def owned(self, most=4):
        """A session, a pool and some of its sequences there, or None."""
        pools = [pool for pool in self.world.pools if pool.seqs]
        if not pools:
            return None
        pool = self.random.choice(pools)
        session = self.random.choice(list(pool.seqs.values())).session
        seqs = [seq for seq in pool.seqs.values() if seq.session is session]
        return session, pool, self.random.sample(seqs, self.random.randint(1, min(most, len(seqs))))

    def raw(self, path, data, status, word):
        code = self.world.statuses[status][1]
        self.world.last, self.world.made = f"{path} {data[:64]!r}", self.world.made + 1
        try:
            reply = self.stub.raw(path, data)
        except Refused as refused:
            self.world.hold(refused.code == code and refused.status == status and word in refused.text,
                            f"{path}: {refused}, not {status} {word}")
            self.world.hold(refused.error.status == self.world.statuses[status][0], f"{path}: {refused.error}")
            return
        self.world.hold(False, f"{path} is done: {reply!r}")

    # ---- handles

    def w_a_closed_handle(self):
        pool = self.pool()
        if not pool.closed:
            return False
        handle = self.random.choice(pool.closed)
        reads = {"GetSeqLens": {}, "GetPageTable": {}, "GetBatchIndices": dict(tokens=[1])}
        name = self.random.choice(list(reads))
        return self.refused(self.session(), name, "KVP_ESTALE", f"{handle:#x}", pool=pool.name, seqs=[handle],
                            **reads[name])

    def w_a_closed_handle_in_a_batch(self):
        found = self.owned()
        if not found or not found[1].closed:
            return False
        session, pool, seqs = found
        handles = [seq.handle for seq in seqs]
        handles.insert(self.random.randint(0, len(seqs)), self.random.choice(pool.closed))
        return self.refused(session, "Advance", "KVP_ESTALE", "seqs[", pool=pool.name, seqs=handles,
                            reserved=[pool.max_tokens] * len(handles))

    def w_a_handle_of_another_generation(self):
        found = self.owned()
        if not found:
            return False
        session, pool, seqs = found
        handle = seqs[0].handle + (1 << 32)
        return self.refused(session, "GetSeqLens", "KVP_ESTALE", f"{handle:#x}", pool=pool.name, seqs=[handle])

    def w_a_handle_of_no_slot(self):
        pool = self.pool()
        handle = self.random.choice((0, (1 << 32) | 0xfffffff0, (1 << 64) - 1))
        return self.refused(self.session(), "GetSeqLens", "KVP_ESTALE", "seqs[0]", pool=pool.name, seqs=[handle])

    def w_another_sessions_sequence(self):
        found = self.owned(1)
        if not found:
            return False
        owner, pool, seqs = found
        others = [s for s in self.world.sessions if s is not owner and pool.name in s.attached]
        if not others:
            return False
        return self.refused(self.random.choice(others), "Advance", "KVP_EPERM", "another session", pool=pool.name,
                            seqs=[seqs[0].handle], reserved=[seqs[0].reserved + 1])

    def w_the_same_sequence_twice(self):
        found = self.owned()
        if not found:
            return False
        session, pool, seqs = found
        handles = [seq.handle for seq in seqs] + [seqs[0].handle]
        return self.refused(session, "Advance", "KVP_EINVAL", "twice", pool=pool.name, seqs=handles,
                            reserved=[seq.reserved for seq in seqs] + [seqs[0].reserved])

    def w_closing_anothers_sequence(self):
        found = self.owned(1)
        if not found:
            return False
        owner, pool, seqs = found
        others = [s for s in self.world.sessions if s is not owner and pool.name in s.attached]
        if not others:
            return False
        return self.refused(self.random.choice(others), "CloseSequences", "KVP_EPERM", "another session",
                            pool=pool.name, seqs=[seqs[0].handle])

    # ---- arrays

    def w_arrays_of_other_lengths(self):
        found = self.owned()
        if not found:
            return False
        session, pool, seqs = found
        handles, n = [seq.handle for seq in seqs], len(seqs)
        name, field, fields = self.random.choice((
            ("Advance", "reserved", dict(reserved=[1] * (n + 1))),
            ("Advance", "written", dict(reserved=[s.reserved for s in seqs], written=[0] * (n + 1))),
            ("GetPageTable", "lengths", dict(lengths=[0] * (n + 1))),
            ("GetBatchIndices", "tokens", dict(tokens=[0] * (n + 1))),
            ("GetBatchIndices", "start", dict(tokens=[0] * n, start=[0] * (n + 1))),
            ("Append", "at", dict(at=[0] * (n + 1), tokens=[1] * n)),
            ("Append", "tokens", dict(at=[0] * n, tokens=[1] * (n + 1))),
        ))
        return self.refused(session, name, "KVP_EINVAL", field, pool=pool.name, seqs=handles, **fields)

    def w_no_sequences_at_all(self):
        found = self.owned()
        if not found:
            return False
        session, pool, _ = found
        return self.refused(session, self.random.choice(("Advance", "GetSeqLens", "CloseSequences")), "KVP_EINVAL",
                            "seqs", pool=pool.name)

    def w_a_batch_over_the_limit(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, seqs = found
        return self.refused(session, "GetSeqLens", "KVP_EINVAL", str(BATCH_MAX), pool=pool.name,
                            seqs=[seqs[0].handle] * (BATCH_MAX + 1))

    # ---- lengths

    def w_reserved_over_the_limit(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, seqs = found
        tokens = self.random.choice((pool.max_tokens + 1, (1 << 24) + 1, (1 << 32) - 1))
        return self.refused(session, "Advance", "KVP_EINVAL", str(pool.max_tokens), pool=pool.name,
                            seqs=[seqs[0].handle], reserved=[tokens])

    def w_less_without_truncate(self):
        found = self.owned()
        seqs = [seq for seq in found[2] if seq.reserved > 0] if found else []
        if not seqs:
            return False
        session, pool, _ = found
        return self.refused(session, "Advance", "KVP_EINVAL", "truncate", pool=pool.name, seqs=[seqs[0].handle],
                            reserved=[seqs[0].reserved - 1])

    def w_written_over_reserved(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        return self.refused(session, "Advance", "KVP_EINVAL", "written", pool=pool.name, seqs=[seq.handle],
                            reserved=[seq.reserved], written=[seq.reserved + 1])

    def w_more_pages_than_there_are(self):
        for _ in range(8):
            found = self.owned(1)
            if not found:
                return False
            session, pool, (seq,) = found
            missing = pool.pages_for(pool.max_tokens) - len(seq.row) - sum(pool.spare())
            if missing > 0:
                return self.refused(session, "Advance", Refusal("KVP_ENOPAGES", str(missing), missing), "",
                                    pool=pool.name, seqs=[seq.handle], reserved=[pool.max_tokens])
        return False

    def w_a_page_table_over_what_is_reserved(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        return self.refused(session, "GetPageTable", "KVP_EINVAL", "lengths[0]", pool=pool.name, seqs=[seq.handle],
                            lengths=[seq.reserved + 1])

    def w_indices_over_what_is_reserved(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        start = self.random.randint(0, seq.reserved)
        return self.refused(session, "GetBatchIndices", "KVP_EINVAL", "[0]", pool=pool.name, seqs=[seq.handle],
                            tokens=[seq.reserved - start + 1], start=[start])

    # ---- append

    def w_an_append_at_another_length(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        at = seq.written + self.random.choice((1, 7)) if seq.written == 0 else seq.written - 1
        return self.refused(session, "Append", "KVP_EMISMATCH", f"{at}", pool=pool.name, seqs=[seq.handle], at=[at],
                            tokens=[1], inline=bytes(pool.token_bytes))

    def w_an_append_with_bytes_missing(self):
        found = self.owned(1)
        if not found or found[2][0].written + 2 > found[1].max_tokens:
            return False
        session, pool, (seq,) = found
        n = 2 * pool.token_bytes + self.random.choice((-1, 1, -pool.token_bytes))
        return self.refused(session, "Append", "KVP_EINVAL", f"{n}", pool=pool.name, seqs=[seq.handle],
                            at=[seq.written], tokens=[2], inline=bytes(n))

    def w_an_append_from_no_buffer(self):
        found = self.owned(1)
        if not found or found[2][0].written + 1 > found[1].max_tokens:
            return False
        session, pool, (seq,) = found
        return self.refused(session, "Append", "KVP_ENOENT", "buffer", pool=pool.name, seqs=[seq.handle],
                            at=[seq.written], tokens=[1], buffer=9)

    def w_an_append_over_the_limit(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        n = pool.max_tokens - seq.written + 1
        return self.refused(session, "Append", "KVP_EINVAL", str(pool.max_tokens), pool=pool.name, seqs=[seq.handle],
                            at=[seq.written], tokens=[n], inline=bytes(n * pool.token_bytes))

    # ---- fork, transfer

    def w_a_fork_of_more_than_is_written(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        return self.refused(session, "Fork", "KVP_EINVAL", "tokens[0]", pool=pool.name, parents=[seq.handle],
                            keys=[1000], tokens=[seq.written + 1])

    def w_a_fork_to_a_key_in_use(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        return self.refused(session, "Fork", "KVP_EEXIST", "keys[0]", pool=pool.name, parents=[seq.handle],
                            keys=[seq.key])

    def w_a_transfer_to_nobody(self):
        found = self.owned(1)
        if not found:
            return False
        session, pool, (seq,) = found
        to = self.random.choice([s.id for s in self.world.ended] + [0, (77 << 32) | 5])
        return self.refused(session, "Transfer", "KVP_ENOENT", "to: session", pool=pool.name, seqs=[seq.handle], to=to)

    # ---- pools and sessions

    def w_a_pool_that_is_not_there(self):
        name = self.random.choice(("nowhere", "x" * 500, "nhd-layer-1 ", "pöl", "ä" * 50))
        call, fields = self.random.choice((("OpenSequences", dict(keys=[1])), ("GetSeqLens", dict(seqs=[1])),
                                           ("DescribePool", {}), ("Detach", {}), ("DeletePool", {})))
        return self.refused(self.session(), call, "KVP_ENOENT", "pool", pool=name, **fields)

    def w_no_pool(self):
        return self.refused(self.session(), "OpenSequences", "KVP_EINVAL", "pool: no name", keys=[1])

    def w_a_pool_that_can_not_be(self):
        plane = dict(layer=0, component=pb.COMPONENT_K, heads=1, dim=8, dtype=pb.DTYPE_F16)
        good = dict(name="new", pages=4, page_tokens=4,
                    planes=[pb.Plane(**plane), pb.Plane(**{**plane, "component": pb.COMPONENT_V})])
        word, change = self.random.choice((
            ("name", dict(name="")), ("name", dict(name="x" * 64)), ("name", dict(name="a b")),
            ("pages", dict(pages=0)), ("pages", dict(pages=(1 << 25) + 1)), ("page_tokens", dict(page_tokens=0)),
            ("page_tokens", dict(page_tokens=4097)), ("planes", dict(planes=[])),
            ("planes", dict(planes=[pb.Plane(**plane)] * 1025)), ("reserved_pages", dict(reserved_pages=4)),
            ("max_sequences", dict(max_sequences=65537)), ("max_sequence_tokens", dict(max_sequence_tokens=1 << 25)),
            ("spec", dict(planes=[pb.Plane(**{**plane, "heads": 0})])),
            ("spec", dict(planes=[pb.Plane(**{**plane, "dim": 1 << 20})])),
            ("spec", dict(planes=[pb.Plane(**{**plane, "dtype": 99})])),
            ("spec", dict(planes=[pb.Plane(**{**plane, "component": 99})])),
            ("spec", dict(planes=[pb.Plane(**plane)] * 2)), ("order", dict(order=99)),
            ("placement", dict(placement=99)), ("linger_ms", dict(linger_ms=(1 << 32) - 1)),
        ))
        return self.refused(self.session(), "CreatePool", "KVP_EINVAL", word, spec=pb.PoolSpec(**{**good, **change}))

    def w_a_pool_on_a_device_that_is_not_here(self):
        plane = pb.Plane(layer=0, component=pb.COMPONENT_K, heads=1, dim=8, dtype=pb.DTYPE_F16)
        change = self.random.choice((dict(devices=["GPU-0123"]), dict(memory=pb.MEMORY_LEGACY_IPC)))
        spec = pb.PoolSpec(name="new", pages=4, page_tokens=4, planes=[plane], **change)
        return self.refused(self.session(), "CreatePool", "KVP_ENODEV", "host", spec=spec)

    def w_a_pool_that_is_there_and_differs(self):
        pool = self.pool()
        spec = pb.PoolSpec()
        spec.CopyFrom(pool.spec)
        spec.pages += 1
        return self.refused(self.session(), "CreatePool", "KVP_EEXIST", pool.name, spec=spec)

    def w_deleting_a_pool_in_use(self):
        found = self.owned(1)
        if not found:
            return False
        return self.refused(found[0], "DeletePool", "KVP_EBUSY", found[1].name, pool=found[1].name)

    def w_detaching_from_a_pool_in_use(self):
        found = self.owned(1)
        if not found:
            return False
        return self.refused(found[0], "Detach", "KVP_EBUSY", found[1].name, pool=found[1].name)

    def w_attaching_with_another_layout(self):
        status, word, field = self.random.choice((
            ("KVP_EMISMATCH", "layout_digest", dict(layout_digest=b"0123456789abcdef")),
            ("KVP_EINVAL", "layout_digest: 5 bytes", dict(layout_digest=b"short")),
            ("KVP_EMISMATCH", "another-model", dict(model="another-model")),
            ("KVP_EMISMATCH", "abi_version", dict(abi_version=99)),
        ))
        return self.refused(self.session(), "Attach", status, word, pool=self.pool().name, **field)

    def w_attaching_where_no_fd_can_be_passed(self):
        return self.refused(self.session(), "Attach", "KVP_EINVAL", "session socket", pool=self.pool().name)

    def w_a_buffer_without_its_memory(self):
        device, status, word = self.random.choice((("host", "KVP_EINVAL", "fds"), ("GPU-0", "KVP_ENODEV", "GPU-0"),
                                                    ("", "KVP_EINVAL", "device")))
        return self.refused(self.session(), "RegisterBuffer", status, word, device=device, bytes=4096)

    def w_no_session(self):
        call, fields = self.random.choice((("OpenSequences", dict(keys=[1])), ("Advance", dict(seqs=[1], reserved=[1])),
                                           ("Attach", {}), ("CloseSequences", dict(seqs=[1]))))
        return self.refused(None, call, "KVP_ESESSION", "session", pool=self.pool().name, **fields)

    def w_a_session_that_is_not_there(self):
        ended = [session.token for session in self.world.ended]
        token = self.random.choice(ended + ["0" * 32, "not a token", "f" * 33, "é"])
        self.world.attempt("KeepAlive", self.stub.request("KeepAlive", session=token),
                           Refusal("KVP_ESESSION", "session"))

    def w_a_lease_that_can_not_be(self):
        lease_ms = self.random.choice((1, 99, 24 * 3600 * 1000 + 1, (1 << 32) - 1))
        return self.refused(None, "OpenSession", "KVP_EINVAL", str(lease_ms), lease_ms=lease_ms)

    def w_a_secret_that_is_none(self):
        secret, status = self.random.choice(((b"x", "KVP_EINVAL"), (bytes(range(16)), "KVP_ENOENT"),
                                             (self.session().resume_secret, "KVP_EBUSY")))
        return self.refused(None, "OpenSession", status, "resume_secret", resume_secret=secret)

    def w_a_call_id_of_another_call(self):
        session = self.session()
        request = dict(session=session.token, call_id=session.call_id + 1, pool=self.pool().name, keys=[])
        session.call_id += 1
        self.world.attempt("OpenSequences", self.stub.request("OpenSequences", **request),
                           Refusal("KVP_EINVAL", "keys"))

    # ---- bytes that are no message

    def w_garbage(self):
        name = self.random.choice(list(self.stub.methods))
        data = b"\xff" * 12 + self.random.randbytes(self.random.randint(0, 60))
        return self.raw(f"/kvpool.v1.KvPool/{name}", data, "KVP_EPROTO", f"{name}Request")

    def w_bytes_cut_off(self):
        found = self.owned()
        if not found:
            return False
        session, pool, seqs = found
        data = self.stub.request("GetSeqLens", session=session.token, pool=pool.name,
                                 seqs=[seq.handle for seq in seqs]).SerializeToString()
        return self.raw("/kvpool.v1.KvPool/GetSeqLens", data[:-1], "KVP_EPROTO", "GetSeqLensRequest")

    def w_strings_that_are_not_utf8(self):
        bad = self.random.choice((b"\xc3\x28", b"\xff", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"ab\xc0\xaf"))
        return self.raw("/kvpool.v1.KvPool/DescribePool", b"\x1a" + bytes([len(bad)]) + bad, "KVP_EPROTO", "UTF-8")

    def w_a_method_that_is_not_there(self):
        path = self.random.choice(("/kvpool.v1.KvPool/Nonsense", "/kvpool.v1.KvPool/getseqlens", "/a.B/GetSeqLens"))
        return self.raw(path, b"", "KVP_ENOSYS", path)
