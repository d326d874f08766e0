"""What a pool should be, in the plainest way: lists of page numbers, counted anew each time.

Pages that a call takes get a number when the daemon names them: until then a `Fresh` stands in their place. The model
says how many there are, where they stand, and that nobody else has them; which ones is the daemon's choice.

    row      [full and written: sealed, may be shared | the rest: this sequence's alone]
    copy     the page whose first written % T tokens are to be copied to row[written // T] before the next append
    keyed    its first pages, which have block keys: naive_cache.py has what follows from them
"""
import contextlib
import copy as copying

from naive_cache import Cache


class Fresh:
    """A page that the daemon has not named yet."""


class Refusal(Exception):
    """The model expects this call to fail, with that status, and that word in its text."""

    def __init__(self, status, word="", missing=None):
        super().__init__(f"{status} {word}")
        self.status, self.word, self.missing = status, word, missing


@contextlib.contextmanager
def short_of(more):
    """A refusal for want of pages says what the whole batch is short of: so many more."""
    try:
        yield
    except Refusal as refusal:
        if refusal.missing is not None:
            refusal.missing += more
        raise


class Seq:
    def __init__(self, handle, key, session, version):
        self.handle, self.key, self.session, self.version = handle, key, session, version
        self.row, self.reserved, self.written, self.copy, self.keyed = [], 0, 0, None, 0
        self.text, self.keys = [], []  # the tokens that it would have, and the keys of their blocks

    def clone(self):
        other = copying.copy(self)
        other.row = list(self.row)
        return other

    def owed(self, page_tokens):
        """(handle, source, destination, tokens), or None."""
        if self.copy is None:
            return None
        return (self.handle, self.copy, self.row[self.written // page_tokens], self.written % page_tokens)


class Pool:
    def __init__(self, spec, row_pages):
        self.name, self.spec = spec.name, spec
        self.pages, self.T, self.first = spec.pages, spec.page_tokens, spec.reserved_pages
        self.max_sequences, self.max_tokens, self.row_pages = spec.max_sequences, spec.max_sequence_tokens, row_pages
        self.seqs = {}       # by handle
        self.sealed = set()  # pages
        self.cache = Cache()
        self.quota = min([share.quota_pages for share in spec.tenants if share.quota_pages] or [self.pages])
        self.closed = []     # handles of old

    def clone(self):
        other = copying.copy(self)
        other.seqs = {handle: seq.clone() for handle, seq in self.seqs.items()}
        other.sealed = set(self.sealed)
        other.cache = self.cache.clone()
        other.closed = list(self.closed)
        return other

    # ---- what is there

    def holders(self):
        """How many rows, owed copies and pins hold each page."""
        count = {}
        rows = [seq.row + ([] if seq.copy is None else [seq.copy]) for seq in self.seqs.values()]
        for row in rows + list(self.cache.pins.values()):
            for page in row:
                count[page] = count.get(page, 0) + 1
        return count

    def used(self):
        return len(set(self.holders()) | set(self.cache.published.values())) - self.cache.to_evict

    def free(self):
        return self.pages - self.first - self.used()

    def rows_used(self):
        return len(self.seqs) + len(self.cache.pins)

    def spare(self):
        """Pages that this user may still take, and cached ones that may go for it."""
        free = min(self.free(), self.quota - self.used())
        return free, len(self.cache.evictable(self.holders())) - self.cache.to_evict

    def pages_for(self, tokens):
        return -(-tokens // self.T)

    def find(self, handle):
        if handle not in self.seqs:
            raise Refusal("KVP_ESTALE", str(handle))
        return self.seqs[handle]

    # ---- what calls do to it

    def take(self, seq, index, n):
        free, may_go = self.spare()
        if n > free + may_go:
            word = f"quota of {self.quota} pages" if self.quota < self.pages else "is short of"
            raise Refusal("KVP_ENOPAGES", word, missing=n - free - may_go)
        self.cache.to_evict += max(0, n - free)
        seq.row[index:index + n] = [Fresh() for _ in range(n)]

    def grow(self, seq, reserved):
        self.take(seq, len(seq.row), self.pages_for(reserved) - len(seq.row))
        seq.reserved = reserved

    def cut(self, seq, reserved):
        keep = self.pages_for(reserved)
        if seq.copy is not None and seq.written // self.T >= keep:
            seq.copy = None
        del seq.row[keep:]
        self.settle()
        seq.written, seq.reserved, seq.version = min(seq.written, reserved), reserved, seq.version + 2
        if reserved % self.T != 0:
            page = seq.row[keep - 1]
            if page in self.sealed or self.holders()[page] > 1:
                seq.copy = page
                self.take(seq, keep - 1, 1)
            else:
                self.cache.names.pop(page, None)
        seq.keyed = min(seq.keyed, reserved // self.T)

    def reserve(self, seq, reserved):
        if reserved > seq.reserved:
            self.grow(seq, reserved)
        elif reserved < seq.reserved:
            self.cut(seq, reserved)

    def observe(self, seq, written):
        if written <= seq.written:
            return
        for index in range(seq.written // self.T, written // self.T):
            self.sealed.add(seq.row[index])
            if seq.row[index] in self.cache.names:
                self.cache.publish(seq.row, index, self.sealed)
        seq.written, seq.copy = written, None
        self.settle()

    def fork_one(self, parent, key, session, tokens):
        if self.rows_used() >= self.max_sequences:
            raise Refusal("KVP_ELIMIT", f"all {self.max_sequences} rows")
        handle = ("child", key)
        child = Seq(handle, key, session, 0)
        full = tokens // self.T
        child.row = parent.row[:full]
        child.reserved = child.written = tokens
        child.text, child.keys, child.keyed = parent.text, parent.keys, min(parent.keyed, full)
        self.seqs[handle] = child
        if tokens % self.T != 0:
            owes = parent.copy is not None and parent.written // self.T == full
            child.copy = parent.copy if owes else parent.row[full]
            self.take(child, full, 1)

    def close(self, seq):
        del self.seqs[seq.handle]
        self.closed.append(seq.handle)
        self.settle()

    def settle(self):
        """A page that nobody holds, and that is not cached, is free: not sealed, and without a key."""
        kept = set(self.holders()) | set(self.cache.published.values())
        self.sealed &= kept
        self.cache.names = {page: key for page, key in self.cache.names.items() if page in kept}

    def name_blocks(self, seq, first, n):
        """The blocks of pages first … first + n of a row have their keys."""
        for index in range(first, first + n):
            page, key = seq.row[index], seq.keys[index]
            assert self.cache.names.get(page, key) == key
            self.cache.names[page] = key
            if page in self.sealed:
                self.cache.publish(seq.row, index, self.sealed)
        seq.keyed = max(seq.keyed, first + n)

    def open_cached(self, seq, blocks):
        """A new sequence takes the longest cached prefix along."""
        seq.row = self.cache.leading(seq.keys[:blocks])
        seq.keyed = len(seq.row)
        seq.reserved = seq.written = len(seq.row) * self.T
        self.cache.lookups += blocks
        self.cache.hits += len(seq.row)

    def evict_prefix(self, keys):
        """From its end on, up to what is held or extended. How many pages."""
        held, n = self.holders(), 0
        for key in reversed(keys):
            if key not in self.cache.published:
                continue
            if self.cache.published[key] in held or self.cache.children(key):
                break
            self.cache.forget([key])
            n += 1
        self.settle()
        return n

    # ---- the same, of a batch: all or nothing is for the caller, who tries it on a clone

    def advance(self, handles, reserved, written, named=()):
        seqs = [self.find(handle) for handle in handles]
        later = [max(0, self.pages_for(tokens) - len(seq.row)) for seq, tokens in zip(seqs, reserved)]
        for i, seq in enumerate(seqs):
            with short_of(sum(later[i + 1:])):
                self.reserve(seq, reserved[i])
            if named:
                self.name_blocks(seq, *named[i])
            if written:
                self.observe(seq, written[i])

    def append(self, handles, tokens):
        seqs = [self.find(handle) for handle in handles]
        reserved = [max(seq.reserved, seq.written + n) for seq, n in zip(seqs, tokens)]
        later = [self.pages_for(n) - len(seq.row) for seq, n in zip(seqs, reserved)]
        for i, seq in enumerate(seqs):
            with short_of(sum(later[i + 1:])):
                self.reserve(seq, reserved[i])
        for seq, n in zip(seqs, tokens):
            self.observe(seq, seq.written + n)

    def fork(self, parents, keys, session, tokens):
        seqs = [self.find(handle) for handle in parents]
        tokens = tokens or [seq.written for seq in seqs]
        for i, seq in enumerate(seqs):
            with short_of(sum(n % self.T != 0 for n in tokens[i + 1:])):
                self.fork_one(seq, keys[i], session, tokens[i])

    # ---- what it answers

    def page_table(self, seqs, lengths):
        """kv_indptr, kv_indices, kv_last_page_len."""
        indptr, indices, last = [0], [], []
        for seq, length in zip(seqs, lengths):
            n = self.pages_for(length)
            indices += seq.row[:n]
            indptr.append(len(indices))
            last.append(length - (n - 1) * self.T if n else 0)
        return indptr, indices, last

    def batch_indices(self, seqs, tokens, start):
        """batch_indices, positions, slots."""
        batch, positions, slots = [], [], []
        for b, (seq, n, first) in enumerate(zip(seqs, tokens, start)):
            for position in range(first, first + n):
                batch.append(b)
                positions.append(position)
                slots.append(seq.row[position // self.T] * self.T + position % self.T)
        return batch, positions, slots

    def name_fresh(self, seq, row):
        """The daemon says what the row of a sequence is: what was known must be so, what is fresh must be free."""
        assert len(row) == len(seq.row), f"{self.name}: {len(row)} pages, not {len(seq.row)}"
        held = {page for page in self.holders() if not isinstance(page, Fresh)} | set(self.cache.published.values())
        for i, (known, page) in enumerate(zip(seq.row, row)):
            if isinstance(known, Fresh):
                assert self.first <= page < self.pages, f"{self.name}: page {page} of {self.first}..{self.pages - 1}"
                assert page not in held, f"{self.name}: page {page} is held by another"
                if known in self.sealed:
                    self.sealed.remove(known)
                    self.sealed.add(page)
                self.cache.rename(known, page)
                seq.row[i] = page
                held.add(page)
            else:
                assert known == page, f"{self.name}: entry {i} of a row was {known} and is {page}"
