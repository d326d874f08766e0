"""What the foreign client has made at the daemon, and how a call is compared with what was foreseen.

`World` holds the sessions and, as naive models, the pools. Every call of the random run goes through `attempt`: it must
be done or be refused as foreseen, with the status, gRPC's code for it, a text that names what was wrong, and the Error
in the trailing metadata.
"""
import collections
import os
import pathlib
import random
import re
import time

import grpc

from grpc_stub import Refused, Stub, pb
from naive_cache import keys_of, some_text
from naive_pool import Fresh, Pool, Refusal, Seq

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
SESSIONS = 4
LEASE_MS = 3600 * 1000  # a session that is not called for a while lives on
DTYPE_BYTES = {pb.DTYPE_F32: 4, pb.DTYPE_F16: 2, pb.DTYPE_BF16: 2, pb.DTYPE_FP8_E4M3: 1, pb.DTYPE_FP8_E5M2: 1,
               pb.DTYPE_U8: 1}
K, V, CKV, KPE = pb.COMPONENT_K, pb.COMPONENT_V, pb.COMPONENT_CKV, pb.COMPONENT_KPE


def planes(layers, dtype, *components):
    """(component, heads, dim) of each layer."""
    return [pb.Plane(layer=layer, component=component, heads=heads, dim=dim, dtype=dtype)
            for layer in range(layers) for component, heads, dim in components]


SPECS = [
    dict(name="nhd-layer-1", pages=300, page_tokens=1, order=pb.ORDER_NHD, placement=pb.PLACEMENT_LAYER,
         planes=planes(1, pb.DTYPE_F16, (K, 2, 4), (V, 2, 4)), max_sequences=30, max_sequence_tokens=64),
    dict(name="hnd-page-3", pages=120, page_tokens=3, order=pb.ORDER_HND, placement=pb.PLACEMENT_PAGE,
         planes=planes(2, pb.DTYPE_BF16, (K, 2, 8), (V, 2, 8)), reserved_pages=3, max_sequences=40,
         max_sequence_tokens=100),
    dict(name="nhd-joined-16", pages=60, page_tokens=16, order=pb.ORDER_NHD, placement=pb.PLACEMENT_LAYER, joined=True,
         planes=planes(2, pb.DTYPE_F32, (K, 1, 16), (V, 1, 16)), max_sequences=40, max_sequence_tokens=200),
    dict(name="hnd-layer-16", pages=64, page_tokens=16, order=pb.ORDER_HND, placement=pb.PLACEMENT_LAYER,
         planes=planes(1, pb.DTYPE_F16, (K, 4, 16), (V, 4, 8)), reserved_pages=1, max_sequences=24,
         max_sequence_tokens=250),
    dict(name="mla-joined-16", pages=48, page_tokens=16, placement=pb.PLACEMENT_LAYER, joined=True,
         planes=planes(3, pb.DTYPE_BF16, (CKV, 1, 32), (KPE, 1, 8)), max_sequences=40, max_sequence_tokens=160),
    dict(name="mla-apart-3", pages=150, page_tokens=3, placement=pb.PLACEMENT_PAGE,
         planes=planes(2, pb.DTYPE_FP8_E4M3, (CKV, 1, 24), (KPE, 1, 8)), max_sequences=40, max_sequence_tokens=90),
    dict(name="quota-4", pages=70, page_tokens=4, planes=planes(1, pb.DTYPE_F16, (K, 1, 4), (V, 1, 4)),
         max_sequences=24, max_sequence_tokens=80, policy=pb.POLICY_LRU,
         tenants=[pb.TenantShare(tenant=os.getuid(), quota_pages=44, guaranteed_pages=9)]),
]
# How the blocks of a pool are named: by tokens (0), or by an engine's keys of so many bytes.
KEY_BYTES = {"hnd-page-3": 32, "mla-joined-16": 8}


class Failure(Exception):
    pass


class Session:
    def __init__(self, reply):
        self.token, self.id, self.resume_secret = reply.session, reply.session_id, reply.resume_secret
        self.call_id, self.attached = 0, set()


def statuses():
    """{name: (value, gRPC's code, text)} of kvp_status.h."""
    codes = {code.value[0]: code.name for code in grpc.StatusCode}
    rows = re.findall(r'X\((KVP_\w+), (-?\d+), (\d+),\s+"(.*)"\)', (PROTO / "kvp_status.h").read_text())
    return {name: (int(value), codes[int(code)], text) for name, value, code, text in rows}


class World:
    def __init__(self, path, seed, restarts=False):
        self.random = random.Random(seed)
        self.stub = Stub(path, again=restarts)
        self.restarts = restarts  # the daemon may be killed under a call, which is then made again
        self.statuses = statuses()
        self.sessions, self.pools, self.ended = [], [], []
        self.made = self.audits = self.repeats = self.refused = 0
        self.by_name = collections.Counter()
        self.last = ""

    # ---- calls, and what comes of them

    def attempt(self, name, request, refusal=None):
        """The reply, or None when it was refused as foreseen."""
        self.last, self.made = f"{name} {request}", self.made + 1
        self.by_name[name] += 1
        try:
            reply = self.stub.send(name, request)
        except Refused as refused:
            if refusal is None:
                raise Failure(f"{name} is refused: {refused}") from None
            self.check_refusal(name, refused, refusal)
            self.refused += 1
            return None
        if refusal is not None:
            raise Failure(f"{name} is done; the model expects {refusal}; the reply: {reply}")
        return reply

    def check_refusal(self, name, refused, refusal):
        value, code, _ = self.statuses[refusal.status]
        what = f"{name}: {refused}; the model expects {refusal}"
        self.hold(refused.status == refusal.status and refused.code == code, what)
        self.hold(refusal.word.lower() in refused.text.lower(), what)
        self.hold(refused.error is not None and refused.error.status == value, f"{what}; {refused.error}")
        self.hold(refused.text == f"{refusal.status}: {refused.error.message}", f"{what}; {refused.error}")
        self.hold(refusal.missing is None or refused.error.missing == refusal.missing,
                  f"{what}: {refused.error.missing} missing, not {refusal.missing}")

    def change(self, session, name, refusal, /, **fields):
        """A call that changes something; some of them are made twice, as after a lost reply."""
        session.call_id += 1
        call_id = session.call_id if self.restarts or self.random.random() < 0.9 else 0
        request = self.stub.request(name, session=session.token, call_id=call_id, **fields)
        reply = self.attempt(name, request, refusal)
        if reply is not None and call_id != 0 and self.random.random() < 0.08:
            if name == "CloseSession":  # with a session goes what was remembered of it
                self.attempt(name, request, Refusal("KVP_ESESSION", "no open session"))
            else:
                self.same("the reply to a repeated call", self.attempt(name, request), reply)
            self.repeats += 1
        return reply

    def read(self, session, name, /, **fields):
        token = session.token if self.random.random() < 0.7 or name == "KeepAlive" else ""
        if name == "ListSequences":
            token = session.token
        return self.attempt(name, self.stub.request(name, session=token, **fields))

    @staticmethod
    def hold(so, what):
        if not so:
            raise Failure(what)

    def same(self, what, found, expected):
        self.hold(found == expected, f"{what}: {found}, by the model {expected}")

    # ---- the model follows

    def foresee(self, pool, change, seqs, *arguments):
        """What the pool will be, and the refusal if it is one."""
        trial = pool.clone()
        try:
            getattr(trial, change)([seq.handle for seq in seqs], *arguments)
        except Refusal as refusal:
            return trial, refusal
        return trial, None

    def adopt(self, pool, trial, seqs):
        """The foreseen became so: learn the numbers of fresh pages, and check all the others. The sequences, as now."""
        pool.seqs, pool.sealed, pool.closed, pool.cache = trial.seqs, trial.sealed, trial.closed, trial.cache
        seqs = [pool.seqs[seq.handle] for seq in seqs]
        handles = [seq.handle for seq in seqs]
        reply = self.stub.call("GetPageTable", pool=pool.name, seqs=handles, lengths=[seq.reserved for seq in seqs])
        rows = [list(reply.kv_indices[begin:end]) for begin, end in zip(reply.kv_indptr, reply.kv_indptr[1:])]
        self.learn(pool, {page for seq, row in zip(seqs, rows) for known, page in zip(seq.row, row)
                          if isinstance(known, Fresh)})
        for seq, row in zip(seqs, rows):
            pool.name_fresh(seq, row)
        reply = self.stub.call("GetSeqLens", pool=pool.name, seqs=handles)
        self.same("lengths", list(reply.lengths), [seq.written for seq in seqs])
        return seqs

    def learn(self, pool, taken=()):
        """Which cached pages went, where some had to; they may have been taken since."""
        if pool.cache.to_evict:
            pool.cache.learn(set(self.listing(pool)) - set(taken), pool.holders())
            pool.settle()

    def found(self):
        """How much of what was looked up by its blocks was there."""
        caches = [pool.cache for pool in self.pools]
        return f"{sum(cache.hits for cache in caches)} of {sum(cache.lookups for cache in caches)} blocks found"

    def listing(self, pool):
        """{page: (parent, children, references)} of all that the daemon finds by its key."""
        found, page = {}, 0
        while True:
            reply = self.stub.call("ListCache", pool=pool.name, from_page=page, limit=40)
            self.same("bytes of keys", len(reply.keys), 16 * len(reply.pages))
            self.hold(set(reply.tenants) <= {os.getuid()}, f"tenants {set(reply.tenants)}")
            found.update(zip(reply.pages, zip(reply.parents, reply.children, reply.references)))
            page = reply.next_page
            if page == 0:
                return found

    def blocks(self, pool, texts, counts, first=()):
        """pb.Blocks of the first counts[i] tokens of texts[i] (behind first[i] pages), or what there is of them."""
        starts = [page * pool.T for page in first] or [0] * len(texts)
        if pool.key_bytes == 0:
            parts = [text[start:start + n] for text, start, n in zip(texts, starts, counts)]
            return pb.Blocks(counts=[len(part) for part in parts], first=first,
                             tokens=[token for part in parts for token in part])
        keys = [keys_of(text, pool.T)[start // pool.T:(start + n) // pool.T]
                for text, start, n in zip(texts, starts, counts)]
        return pb.Blocks(counts=[len(entry) for entry in keys], first=first, key_bytes=pool.key_bytes,
                         keys=b"".join(key[:pool.key_bytes] for entry in keys for key in entry))

    def text(self, pool):
        text = some_text(self.random, pool.T, pool.max_tokens)
        pool.cache.remember(keys_of(text, pool.T))
        return text

    def add(self, pool, handle, key, session, version):
        self.hold(handle not in pool.seqs and handle not in pool.closed, f"handle {handle} was given out before")
        seq = pool.seqs[handle] = Seq(handle, key, session, version)
        seq.text = self.text(pool)
        seq.keys = keys_of(seq.text, pool.T)
        return seq

    def name_children(self, pool, trial, keys, reply):
        """Children of a fork stand under their keys until the reply names them."""
        self.same("children", len(reply.seqs), len(keys))
        for key, handle, version in zip(keys, reply.seqs, reply.versions):
            self.hold(handle not in pool.seqs and handle not in pool.closed, f"handle {handle} was given out before")
            child = trial.seqs.pop(("child", key))
            child.handle, child.version = handle, version
            trial.seqs[handle] = child
        return [trial.seqs[handle] for handle in reply.seqs]

    def copies(self, pool, seqs, reply):
        found = list(zip(reply.copy_seqs, reply.copy_sources, reply.copy_destinations, reply.copy_tokens))
        owed = [seq.owed(pool.T) for seq in seqs]
        self.same("copies owed", sorted(found), sorted(copy for copy in owed if copy is not None))

    # ---- all of it

    def open_session(self):
        reply = self.attempt("OpenSession", self.stub.request("OpenSession", lease_ms=LEASE_MS, name="foreign"))
        self.same("lease", reply.lease_ms, LEASE_MS)
        self.sessions.append(Session(reply))

    def end_session(self, session):
        """Its sequences end with it; its pages come back when nothing is left of it."""
        repeated = self.stub.repeated
        try:
            self.change(session, "CloseSession", None)
        except Failure as failure:  # made again after it was done: with a session goes what was remembered of it
            self.hold(self.stub.repeated > repeated and "KVP_ESESSION" in str(failure), str(failure))
        self.sessions.remove(session)
        self.ended.append(session)
        limit = time.monotonic() + 60
        while session.id in [s.session_id for s in self.stub.call("GetStats").sessions]:
            self.hold(time.monotonic() < limit, f"session {session.id} does not end")
        for pool in self.pools:
            for seq in [seq for seq in pool.seqs.values() if seq.session is session]:
                pool.close(seq)

    def begin(self):
        for _ in range(SESSIONS):
            self.open_session()
        for fields in SPECS:
            spec = pb.PoolSpec(**fields)
            info = self.attempt("CreatePool", self.stub.request("CreatePool", session=self.sessions[0].token, call_id=0,
                                                                spec=spec)).pool
            pool = Pool(info.spec, info.row_pages)
            pool.token_bytes = sum(p.heads * p.dim * DTYPE_BYTES[p.dtype] for p in spec.planes)
            pool.pinned = {}  # as in the cache: the text, and how many tokens of it
            pool.info, pool.key_bytes = info, KEY_BYTES.get(spec.name, 0)
            self.same("bytes of a page", info.page_bytes, pool.token_bytes * spec.page_tokens)
            self.same("pages of a row", info.row_pages, pool.pages_for(spec.max_sequence_tokens))
            self.hold(info.slab_bytes >= info.page_bytes * spec.pages, f"slab of {info.slab_bytes} bytes")
            self.hold(info.state == pb.POOL_LIVE and info.backend == "host", f"{info}")
            self.check_pool(info, pool)
            self.pools.append(pool)

    def check_pool(self, info, pool):
        self.same("layout", [p.offset for p in info.layout], [p.offset for p in pool.info.layout])
        self.same("free pages", info.free_pages, pool.free())
        self.same("sequences", info.sequences, len(pool.seqs))
        self.same("quarantine", info.quarantined_pages, 0)
        cache, held = pool.cache, pool.holders()
        unheld = [page for page in cache.published.values() if page not in held]
        self.same("the cache", (info.cache.published_pages, info.cache.cached_pages, info.cache.dirty_pages,
                                info.cache.pins, info.cache.lookup_blocks, info.cache.hit_blocks),
                  (len(cache.published), len(unheld), 0, len(cache.pins), cache.lookups, cache.hits))
        self.same("use", [(use.tenant, use.pages, use.cached_pages) for use in info.cache.tenants if use.pages],
                  [(os.getuid(), pool.used(), len(unheld))] if pool.used() else [])

    def check_listing(self, pool):
        """Each page that is found, the page before it, how many extend it, and who holds it."""
        cache, held = pool.cache, pool.holders()
        expected = {page: (cache.published.get(cache.parents[key], 0xffffffff), cache.children(key), held.get(page, 0))
                    for key, page in cache.published.items()}
        self.same("the cache's pages", self.listing(pool), expected)

    def audit(self):
        """The ledger is whole, and every page is where the model has it."""
        reply = self.stub.call("Audit")
        self.hold(reply.clean and reply.count == 0 and not reply.violations, f"audit: {list(reply.violations)}")
        for pool in self.pools:
            fresh = [page for page in pool.holders() if isinstance(page, Fresh)]
            self.hold(not fresh, f"{pool.name}: {len(fresh)} pages without a number")
            self.check_pool(self.stub.call("DescribePool", pool=pool.name).pool, pool)
            self.check_listing(pool)
        self.audits += 1

    def give_back_cache(self, session, pool):
        """What is pinned and what is cached."""
        for text, n in pool.pinned.values():
            self.change(session, "Pin", None, pool=pool.name, blocks=self.blocks(pool, [text], [n]), lease_ms=0)
        cached = len(pool.cache.published)
        reply = self.change(session, "Evict", None, pool=pool.name)
        self.same("pages evicted at the end", reply.pages, cached)
        pool.cache.published.clear()
        pool.settle()

    def end(self):
        """Give everything back: nothing is left."""
        self.audit()
        for session in list(self.sessions[1:]):
            self.end_session(session)
        session = self.sessions[0]
        for pool in self.pools:
            owned = [seq for seq in pool.seqs.values()]
            if owned:
                self.change(session, "CloseSequences", None, pool=pool.name, seqs=[seq.handle for seq in owned])
            for seq in owned:
                pool.close(seq)
            pool.cache.pins.clear()
            self.give_back_cache(session, pool)
            self.same("free pages at the end", self.stub.call("DescribePool", pool=pool.name).pool.free_pages,
                      pool.pages - pool.first)
        self.end_session(session)
        self.audit()
        for pool in self.pools:
            self.stub.call("DeletePool", pool=pool.name)
        self.same("pools at the end", list(self.stub.call("ListPools").names), [])
