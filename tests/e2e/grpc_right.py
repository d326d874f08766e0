"""The right calls of the foreign client, each made at random with what the naive model says of it.

A right call may still be refused, where the model says so: out of pages, a row too many. Each function makes one call.
"""
from grpc_stub import pb
from naive_pool import Refusal

KEYS = range(1, 25)


class Right:
    def __init__(self, world):
        self.world, self.random = world, world.random

    def some(self, seqs, most=6):
        return self.random.sample(seqs, self.random.randint(1, min(most, len(seqs))))

    def place(self):
        """A session, a pool, and the session's sequences there."""
        session, pool = self.random.choice(self.world.sessions), self.random.choice(self.world.pools)
        return session, pool, [seq for seq in pool.seqs.values() if seq.session is session]

    def any_of(self, pool, most=6):
        seqs = list(pool.seqs.values())
        return self.some(seqs, most) if seqs else []

    # ---- calls that change something

    def open_sequences(self):
        session, pool, owned = self.place()
        keys = self.random.sample(KEYS, self.random.randint(1, 4))
        known = {seq.key: seq for seq in owned}
        new = [key for key in keys if key not in known]
        refusal = None
        if new and len(pool.seqs) + len(new) > pool.max_sequences:
            refusal = Refusal("KVP_ELIMIT", f"all {pool.max_sequences} rows")
        reply = self.world.change(session, "OpenSequences", refusal, pool=pool.name, keys=keys)
        if reply is None:
            return
        session.attached.add(pool.name)
        for i, key in enumerate(keys):
            if key in known:
                seq = known[key]
                self.world.same("an open key", (reply.seqs[i], reply.versions[i]), (seq.handle, seq.version))
            else:
                seq = self.world.add(pool, reply.seqs[i], key, session, reply.versions[i])
            self.world.same("its lengths", (reply.reserved[i], reply.written[i]), (seq.reserved, seq.written))

    def advance(self):
        session, pool, owned = self.place()
        if not owned:
            return self.open_sequences()
        seqs, truncate = self.some(owned), self.random.random() < 0.3
        reserved = [self.goal(pool, seq, truncate) for seq in seqs]
        written = []
        if self.random.random() < 0.6:
            written = [self.random.randint(min(s.written, r), r) for s, r in zip(seqs, reserved)]
        trial, refusal = self.world.foresee(pool, "advance", seqs, reserved, written)
        reply = self.world.change(session, "Advance", refusal, pool=pool.name, seqs=[s.handle for s in seqs],
                                  reserved=reserved, written=written, truncate=truncate)
        if reply is not None:
            seqs = self.world.adopt(pool, trial, seqs)
            self.world.same("written", list(reply.written), [seq.written for seq in seqs])
            self.world.same("versions", list(reply.versions), [seq.version for seq in seqs])
            self.world.copies(pool, seqs, reply)

    def goal(self, pool, seq, truncate):
        if truncate and self.random.random() < 0.6:
            return self.random.randint(0, seq.reserved)
        more = self.random.choice((0, 1, pool.T, self.random.randint(0, 3 * pool.T)))
        return min(seq.reserved + more, pool.max_tokens)

    def append(self):
        session, pool, owned = self.place()
        owned = [seq for seq in owned if seq.written < pool.max_tokens]
        if not owned:
            return self.open_sequences()
        seqs = self.some(owned, 4)
        tokens = [self.random.randint(1, min(2 * pool.T + 1, pool.max_tokens - seq.written)) for seq in seqs]
        trial, refusal = self.world.foresee(pool, "append", seqs, tokens)
        reply = self.world.change(session, "Append", refusal, pool=pool.name, seqs=[s.handle for s in seqs],
                                  at=[seq.written for seq in seqs], tokens=tokens,
                                  inline=self.random.randbytes(pool.token_bytes * sum(tokens)))
        if reply is not None:
            seqs = self.world.adopt(pool, trial, seqs)
            self.world.same("written", list(reply.written), [seq.written for seq in seqs])

    def fork(self):
        session, pool, owned = self.place()
        parents = [seq for seq in pool.seqs.values() if seq.written > 0]
        free = sorted(set(KEYS) - {seq.key for seq in owned})
        if not parents or len(free) < 2:
            return self.open_sequences()
        parents = self.some(parents, 2)
        keys = self.random.sample(free, len(parents))
        tokens = [self.random.randint(0, seq.written) for seq in parents] if self.random.random() < 0.6 else []
        trial, refusal = self.world.foresee(pool, "fork", parents, keys, session, tokens)
        reply = self.world.change(session, "Fork", refusal, pool=pool.name, parents=[seq.handle for seq in parents],
                                  keys=keys, tokens=tokens)
        if reply is None:
            return
        session.attached.add(pool.name)
        children = self.world.name_children(pool, trial, keys, reply)
        children = self.world.adopt(pool, trial, children)
        self.world.same("written", list(reply.written), [seq.written for seq in children])
        self.world.copies(pool, children, reply)

    def transfer(self):
        session, pool, owned = self.place()
        to = self.random.choice(self.world.sessions)
        if not owned or to is session or pool.name not in to.attached:
            return self.open_sequences()
        seqs = self.some(owned, 3)
        theirs = {seq.key for seq in pool.seqs.values() if seq.session is to}
        refusal = Refusal("KVP_EEXIST", "key") if theirs & {seq.key for seq in seqs} else None
        reply = self.world.change(session, "Transfer", refusal, pool=pool.name, seqs=[seq.handle for seq in seqs],
                                  to=to.id)
        if reply is None:
            return
        for seq in seqs:
            seq.session, seq.version = to, seq.version + 2
        self.world.same("versions", list(reply.versions), [seq.version for seq in seqs])

    def close(self):
        session, pool, owned = self.place()
        if not owned:
            return self.open_sequences()
        seqs = self.some(owned, 3)
        handles = [seq.handle for seq in seqs] + self.random.sample(pool.closed[-20:], min(1, len(pool.closed)))
        self.world.change(session, "CloseSequences", None, pool=pool.name, seqs=handles)
        for seq in seqs:
            pool.close(seq)

    def what_is_so_already(self):
        session, pool, owned = self.place()
        if not owned:
            return self.open_sequences()
        seqs = self.some(owned)
        reply = self.world.change(session, "Advance", None, pool=pool.name, seqs=[seq.handle for seq in seqs],
                                  reserved=[seq.reserved for seq in seqs])
        self.world.same("versions", list(reply.versions), [seq.version for seq in seqs])
        self.world.copies(pool, seqs, reply)

    def nothing_in_quarantine(self):
        session, pool, _ = self.place()
        reply = self.world.change(session, "ReleaseQuarantine", None, pool=pool.name,
                                  session_id=self.random.choice((0, session.id, (99 << 32) | 3)))
        self.world.same("pages in quarantine", reply.pages, 0)

    def another_session(self):
        """One ends, with all that it has; another one begins."""
        self.world.end_session(self.random.choice(self.world.sessions))
        self.world.open_session()

    # ---- calls that read

    def lengths(self):
        session, pool, _ = self.place()
        seqs = self.any_of(pool, 20)
        if not seqs:
            return self.open_sequences()
        reply = self.world.read(session, "GetSeqLens", pool=pool.name, seqs=[seq.handle for seq in seqs])
        self.world.same("lengths", list(reply.lengths), [seq.written for seq in seqs])

    def page_table(self):
        session, pool, _ = self.place()
        seqs = self.any_of(pool)
        if not seqs:
            return self.open_sequences()
        given = [self.random.randint(0, seq.reserved) for seq in seqs] if self.random.random() < 0.6 else []
        lengths = given or [seq.written for seq in seqs]
        reply = self.world.read(session, "GetPageTable", pool=pool.name, seqs=[seq.handle for seq in seqs],
                                lengths=given)
        self.world.same("page table", (list(reply.kv_indptr), list(reply.kv_indices), list(reply.kv_last_page_len)),
                        pool.page_table(seqs, lengths))
        self.world.same("lengths", list(reply.lengths), lengths)

    def batch_indices(self):
        session, pool, _ = self.place()
        seqs = self.any_of(pool)
        if not seqs:
            return self.open_sequences()
        start = [self.random.randint(0, seq.reserved) for seq in seqs] if self.random.random() < 0.5 else []
        first = start or [seq.written for seq in seqs]
        tokens = [self.random.randint(0, seq.reserved - n) for seq, n in zip(seqs, first)]
        reply = self.world.read(session, "GetBatchIndices", pool=pool.name, seqs=[seq.handle for seq in seqs],
                                tokens=tokens, start=start)
        self.world.same("batch indices", (list(reply.batch_indices), list(reply.positions), list(reply.slots)),
                        pool.batch_indices(seqs, tokens, first))

    def list_sequences(self):
        session, pool, owned = self.place()
        everyone, limit = self.random.random() < 0.5, self.random.choice((0, 3))
        found, slot = {}, 0
        while True:
            reply = self.world.read(session, "ListSequences", pool=pool.name, all=everyone, from_slot=slot, limit=limit)
            for i, state in enumerate(reply.states):
                if state == pb.SEQUENCE_OPEN:
                    found[reply.seqs[i]] = (reply.keys[i], reply.reserved[i], reply.written[i], reply.versions[i],
                                            reply.session_ids[i])
            slot = reply.next_slot
            if slot == 0:
                break
        expected = {seq.handle: (seq.key, seq.reserved, seq.written, seq.version, seq.session.id)
                    for seq in (pool.seqs.values() if everyone else owned)}
        self.world.same("sequences", found, expected)

    def describe(self):
        session, pool, _ = self.place()
        self.world.check_pool(self.world.read(session, "DescribePool", pool=pool.name).pool, pool)

    def keep_alive(self):
        session = self.random.choice(self.world.sessions)
        reply = self.world.read(session, "KeepAlive")
        self.world.same("session", reply.session_id, session.id)


WEIGHTS = {"advance": 22, "append": 20, "open_sequences": 8, "fork": 9, "transfer": 4, "close": 6,
           "what_is_so_already": 2, "lengths": 6, "page_table": 6, "batch_indices": 6, "list_sequences": 2,
           "describe": 2, "keep_alive": 1, "nothing_in_quarantine": 1, "another_session": 0.3}
