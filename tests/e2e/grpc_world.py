"""What the foreign client has made at the daemon, and how a call is compared with what was foreseen.

`World` holds the sessions and, as naive models, the pools. Every call of the random run goes through `attempt`: it must
be done or be refused as foreseen, with the status, gRPC's code for it, a text that names what was wrong, and the Error
in the trailing metadata.
"""
import collections
import pathlib
import random
import re
import time

import grpc

from grpc_stub import Refused, Stub, pb
from naive_pool import Fresh, Pool, Refusal, Seq

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
SESSIONS = 4
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
]


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
        pool.seqs, pool.sealed, pool.closed = trial.seqs, trial.sealed, trial.closed
        seqs = [pool.seqs[seq.handle] for seq in seqs]
        handles = [seq.handle for seq in seqs]
        reply = self.stub.call("GetPageTable", pool=pool.name, seqs=handles, lengths=[seq.reserved for seq in seqs])
        for seq, begin, end in zip(seqs, reply.kv_indptr, reply.kv_indptr[1:]):
            pool.name_fresh(seq, list(reply.kv_indices[begin:end]))
        reply = self.stub.call("GetSeqLens", pool=pool.name, seqs=handles)
        self.same("lengths", list(reply.lengths), [seq.written for seq in seqs])
        return seqs

    def add(self, pool, handle, key, session, version):
        self.hold(handle not in pool.seqs and handle not in pool.closed, f"handle {handle} was given out before")
        pool.seqs[handle] = Seq(handle, key, session, version)
        return pool.seqs[handle]

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
        reply = self.attempt("OpenSession", self.stub.request("OpenSession", lease_ms=60000, name="foreign"))
        self.same("lease", reply.lease_ms, 60000)
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
        limit = time.monotonic() + 30
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
            pool.info = info
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

    def audit(self):
        """The ledger is whole, and every page is where the model has it."""
        reply = self.stub.call("Audit")
        self.hold(reply.clean and reply.count == 0 and not reply.violations, f"audit: {list(reply.violations)}")
        for pool in self.pools:
            self.hold(not any(isinstance(page, Fresh) for page in pool.holders()), f"{pool.name}: a page without number")
            self.check_pool(self.stub.call("DescribePool", pool=pool.name).pool, pool)
        self.audits += 1

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
            self.same("free pages at the end", self.stub.call("DescribePool", pool=pool.name).pool.free_pages,
                      pool.pages - pool.first)
        self.end_session(session)
        self.audit()
        for pool in self.pools:
            self.stub.call("DeletePool", pool=pool.name)
        self.same("pools at the end", list(self.stub.call("ListPools").names), [])
