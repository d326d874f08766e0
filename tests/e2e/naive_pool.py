"""What a pool should be, in the plainest way: lists of page numbers, counted anew each time.

Pages that a call takes get a number when the daemon names them: until then a `Fresh` stands in their place. The model
says how many there are, where they stand, and that nobody else has them; which ones is the daemon's choice.

    row      [full and written: sealed, may be shared | the rest: this sequence's alone]
    copy     the page whose first written % T tokens are to be copied to row[written // T] before the next append
"""
import contextlib
import copy as copying


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
        self.row, self.reserved, self.written, self.copy = [], 0, 0, None

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
        self.closed = []     # handles of old

    def clone(self):
        other = copying.copy(self)
        other.seqs = {handle: seq.clone() for handle, seq in self.seqs.items()}
        other.sealed = set(self.sealed)
        other.closed = list(self.closed)
        return other

    # ---- what is there

    def holders(self):
        """How many rows and owed copies hold each page."""
        count = {}
        for seq in self.seqs.values():
            for page in seq.row + ([] if seq.copy is None else [seq.copy]):
                count[page] = count.get(page, 0) + 1
        return count

    def free(self):
        return self.pages - self.first - len(self.holders())

    def pages_for(self, tokens):
        return -(-tokens // self.T)

    def find(self, handle):
        if handle not in self.seqs:
            raise Refusal("KVP_ESTALE", str(handle))
        return self.seqs[handle]

    # ---- what calls do to it

    def take(self, seq, index, n):
        if n > self.free():
            raise Refusal("KVP_ENOPAGES", missing=n - self.free())
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

    def reserve(self, seq, reserved):
        if reserved > seq.reserved:
            self.grow(seq, reserved)
        elif reserved < seq.reserved:
            self.cut(seq, reserved)

    def observe(self, seq, written):
        if written <= seq.written:
            return
        self.sealed.update(seq.row[seq.written // self.T:written // self.T])
        seq.written, seq.copy = written, None
        self.settle()

    def fork_one(self, parent, key, session, tokens):
        if len(self.seqs) >= self.max_sequences:
            raise Refusal("KVP_ELIMIT", f"all {self.max_sequences} rows")
        handle = ("child", key)
        child = Seq(handle, key, session, 0)
        full = tokens // self.T
        child.row = parent.row[:full]
        child.reserved = child.written = tokens
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
        """A page that nobody holds is free, and not sealed."""
        self.sealed &= set(self.holders())

    # ---- the same, of a batch: all or nothing is for the caller, who tries it on a clone

    def advance(self, handles, reserved, written):
        seqs = [self.find(handle) for handle in handles]
        later = [max(0, self.pages_for(tokens) - len(seq.row)) for seq, tokens in zip(seqs, reserved)]
        for i, seq in enumerate(seqs):
            with short_of(sum(later[i + 1:])):
                self.reserve(seq, reserved[i])
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
        held = {page for page in self.holders() if not isinstance(page, Fresh)}
        for i, (known, page) in enumerate(zip(seq.row, row)):
            if isinstance(known, Fresh):
                assert self.first <= page < self.pages, f"{self.name}: page {page} of {self.first}..{self.pages - 1}"
                assert page not in held, f"{self.name}: page {page} is held by another"
                if known in self.sealed:
                    self.sealed.remove(known)
                    self.sealed.add(page)
                seq.row[i] = page
                held.add(page)
            else:
                assert known == page, f"{self.name}: entry {i} of a row was {known} and is {page}"
