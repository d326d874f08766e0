"""The right calls of the foreign client, each made at random with what the naive model says of it.

A right call may still be refused, where the model says so: out of pages, a row too many. Each function makes one call.
"""
from grpc_stub import pb
from naive_cache import keys_of
from naive_pool import Refusal

KEYS = range(1, 25)
LEASE_MS_MAX = 24 * 3600 * 1000


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
        if new and pool.rows_used() + len(new) > pool.max_sequences:
            refusal = Refusal("KVP_ELIMIT", f"all {pool.max_sequences} rows")
        with_blocks = self.random.random() < 0.6
        texts = [known[key].text if key in known else self.world.text(pool) for key in keys]
        counts = [self.random.randint(0, pool.max_tokens) for _ in keys]
        blocks = self.world.blocks(pool, texts, counts) if with_blocks else None
        reply = self.world.change(session, "OpenSequences", refusal, pool=pool.name, keys=keys, blocks=blocks)
        if reply is None:
            return
        session.attached.add(pool.name)
        self.world.same("prefixes", len(reply.cached), len(keys) if with_blocks else 0)
        for i, key in enumerate(keys):
            n = counts[i] // pool.T if with_blocks else 0
            if key in known:
                seq, found = known[key], min(n, known[key].keyed)
                self.world.same("an open key", (reply.seqs[i], reply.versions[i]), (seq.handle, seq.version))
            else:
                seq = self.world.add(pool, reply.seqs[i], key, session, reply.versions[i])
                seq.text, seq.keys = texts[i], keys_of(texts[i], pool.T)
                pool.open_cached(seq, n)
                found = len(seq.row)
            self.world.same("its lengths", (reply.reserved[i], reply.written[i]), (seq.reserved, seq.written))
            if with_blocks:
                self.world.same("taken along", reply.cached[i], found * pool.T)
        if with_blocks:
            self.world.adopt(pool, pool, [pool.seqs[handle] for handle in reply.seqs])

    def advance(self):
        session, pool, owned = self.place()
        if not owned:
            return self.open_sequences()
        seqs, truncate = self.some(owned), self.random.random() < 0.3
        reserved = [self.goal(pool, seq, truncate) for seq in seqs]
        written = []
        if self.random.random() < 0.6:
            written = [self.random.randint(min(s.written, r), r) for s, r in zip(seqs, reserved)]
        named = [self.names(pool, s, r) for s, r in zip(seqs, reserved)] if self.random.random() < 0.6 else []
        trial, refusal = self.world.foresee(pool, "advance", seqs, reserved, written, named)
        if trial.cache.is_unsure([seq.row for seq in trial.seqs.values()], trial.holders()):
            written, named = [], []
            trial, refusal = self.world.foresee(pool, "advance", seqs, reserved, written)
        blocks = None
        if named:
            blocks = self.world.blocks(pool, [s.text for s in seqs],
                                       [n * pool.T + self.random.randrange(pool.T) for _, n in named],
                                       [first for first, _ in named])
        reply = self.world.change(session, "Advance", refusal, pool=pool.name, seqs=[s.handle for s in seqs],
                                  reserved=reserved, written=written, truncate=truncate, blocks=blocks)
        if reply is not None:
            seqs = self.world.adopt(pool, trial, seqs)
            self.world.same("written", list(reply.written), [seq.written for seq in seqs])
            self.world.same("versions", list(reply.versions), [seq.version for seq in seqs])
            self.world.copies(pool, seqs, reply)

    def names(self, pool, seq, reserved):
        """(first, n): pages to be named, all of them within `reserved`; mostly those behind what is named."""
        full, keyed = reserved // pool.T, min(seq.keyed, reserved // pool.T)
        first = keyed if self.random.random() < 0.7 else self.random.randint(0, keyed)
        return first, self.random.randint(0, full - first)

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
        if trial.cache.is_unsure([seq.row for seq in trial.seqs.values()], trial.holders()):
            return self.open_sequences()
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

    # ---- the prefix cache

    def prefix(self, pool):
        """A text, how many tokens of it, and the keys of its whole blocks: mostly of what somebody has written."""
        seqs = list(pool.seqs.values())
        text = self.random.choice(seqs).text if seqs and self.random.random() < 0.6 else self.world.text(pool)
        n = self.random.randint(pool.T, pool.max_tokens)
        return text, n, keys_of(text, pool.T)[:n // pool.T]

    def pin(self):
        session, pool, _ = self.place()
        text, n, keys = self.prefix(pool)
        pages = pool.cache.leading(keys)
        if len(pages) < len(keys) and pages and self.random.random() < 0.8:  # as much as is there
            n, keys = len(pages) * pool.T, keys[:len(pages)]
        refusal = None
        if len(pages) < len(keys):
            refusal = Refusal("KVP_ENOENT", f"the first {len(pages)} are cached")
        elif keys[-1] not in pool.cache.pins and pool.rows_used() >= pool.max_sequences:
            refusal = Refusal("KVP_ELIMIT", f"all {pool.max_sequences} rows")
        reply = self.world.change(session, "Pin", refusal, pool=pool.name, blocks=self.world.blocks(pool, [text], [n]),
                                  lease_ms=LEASE_MS_MAX)
        if reply is not None:
            self.world.same("pinned", list(reply.pinned), [len(keys) * pool.T])
            pool.cache.pins[keys[-1]], pool.pinned[keys[-1]] = pages, (text, n)

    def unpin(self):
        session, pool, _ = self.place()
        text, n, keys = self.prefix(pool)
        if pool.pinned and self.random.random() < 0.8:
            text, n = self.random.choice(list(pool.pinned.values()))
            keys = keys_of(text, pool.T)[:n // pool.T]
        pinned = keys[-1] in pool.cache.pins
        reply = self.world.change(session, "Pin", None, pool=pool.name, blocks=self.world.blocks(pool, [text], [n]))
        self.world.same("unpinned", list(reply.pinned), [len(keys) * pool.T if pinned else 0])
        pool.cache.pins.pop(keys[-1], None)
        pool.pinned.pop(keys[-1], None)
        pool.settle()

    def evict(self):
        session, pool, _ = self.place()
        n, may_go = self.random.randint(1, 6), len(pool.cache.evictable(pool.holders()))
        if self.random.random() < 0.1:
            n = 0
        reply = self.world.change(session, "Evict", None, pool=pool.name, pages=n)
        pool.cache.to_evict = min(n or may_go, may_go)
        self.world.same("pages evicted", reply.pages, pool.cache.to_evict)
        self.world.learn(pool)

    def evict_prefix(self):
        session, pool, _ = self.place()
        text, n, keys = self.prefix(pool)
        reply = self.world.change(session, "Evict", None, pool=pool.name, blocks=self.world.blocks(pool, [text], [n]))
        self.world.same("pages evicted", reply.pages, pool.evict_prefix(keys))

    def match(self):
        session, pool, _ = self.place()
        prefixes = [self.prefix(pool) for _ in range(self.random.randint(1, 3))]
        blocks = self.world.blocks(pool, [text for text, _, _ in prefixes], [n for _, n, _ in prefixes])
        reply = self.world.read(session, "Match", pool=pool.name, with_pages=True, blocks=blocks)
        found = [pool.cache.leading(keys) for _, _, keys in prefixes]
        self.world.same("cached", list(reply.cached), [len(pages) * pool.T for pages in found])
        self.world.same("their pages", list(reply.pages), [page for pages in found for page in pages])

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
           "match": 4, "pin": 2, "unpin": 2, "evict": 1.5, "evict_prefix": 1, "describe": 2, "keep_alive": 1,
           "nothing_in_quarantine": 1, "another_session": 0.3}
