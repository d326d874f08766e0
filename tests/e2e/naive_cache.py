"""What the prefix cache of a pool should be: dictionaries of block keys, searched anew each time.

A text is the tokens that a sequence would have, as far as it goes; texts share beginnings. A block's key stands for its
tokens and all before them. Which cached pages leave when room is needed is the daemon's choice: the model says how many
there are to go and which may, and learns from a listing which went.

    names       page -> key, of pages that have one
    published   key -> the page that is found by it
    pins        key of a prefix's last block -> its pages
"""
import hashlib

FAMILIES, WAYS = 3, (0, 0, 0, 1)


def some_text(random, T, n):
    """n tokens: a family, and at each page one of two ways on."""
    path, text = f"{random.randrange(FAMILIES)}", []
    for i in range(n):
        if i % T == 0:
            path += str(random.choice(WAYS))
        text.append(int.from_bytes(hashlib.blake2b(f"{path} {i}".encode(), digest_size=4).digest(), "little"))
    return text


def keys_of(text, T):
    """A key of 32 bytes for each block; what an engine would say, too."""
    keys, state = [], b""
    for end in range(T, len(text) + 1, T):
        block = b"".join(token.to_bytes(4, "little") for token in text[end - T:end])
        state = hashlib.sha256(state + block).digest()
        keys.append(state)
    return keys


class Cache:
    """The part of a naive pool that is its cache; `rows` are the pool's own."""

    def __init__(self):
        self.names, self.published, self.pins = {}, {}, {}
        self.parents = {}  # of every key that was ever used
        self.to_evict = self.lookups = self.hits = 0

    def clone(self):
        other = Cache()
        other.names, other.published, other.pins = dict(self.names), dict(self.published), dict(self.pins)
        other.parents = self.parents
        other.to_evict, other.lookups, other.hits = self.to_evict, self.lookups, self.hits
        return other

    def remember(self, keys):
        for parent, key in zip([None, *keys], keys):
            self.parents[key] = parent

    def leading(self, keys):
        """The pages of the first keys that are known, up to the first that is not."""
        pages = []
        for key in keys:
            if key not in self.published:
                break
            pages.append(self.published[key])
        return pages

    def children(self, key):
        return sum(1 for other in self.published if self.parents[other] == key)

    def evictable(self, held):
        """Keys whose pages may go, after those that extend them: nobody holds them, nor any that extends them."""
        kept = set()
        for key, page in self.published.items():
            while page in held and key is not None and key not in kept:
                kept.add(key)
                key = self.parents[key]
        return set(self.published) - kept

    def publish(self, row, index, sealed):
        """Page `index` of a row, and what is missing before it."""
        if self.names[row[index]] in self.published:
            return
        first = index
        while first > 0 and self.names.get(row[first - 1]) not in self.published:
            if row[first - 1] not in self.names or row[first - 1] not in sealed:
                return
            first -= 1
        for page in row[first:index + 1]:
            self.published[self.names[page]] = page

    def is_unsure(self, rows, held):
        """Would it matter which pages went? A row whose page is not the one that is found by its key may publish its
        own instead, once that one is gone."""
        return self.to_evict > 0 and any(
            page in self.names and self.published.get(self.names[page], page) != page and
            self.published[self.names[page]] not in held for row in rows for page in row)

    def learn(self, stayed, held):
        """The pages that are found as before: those that went must have been free to go, as all that extend them."""
        gone = {key for key, page in self.published.items() if isinstance(page, int) and page not in stayed}
        assert len(gone) == self.to_evict, f"{len(gone)} pages went, by the model {self.to_evict}"
        assert gone <= self.evictable(held), "a page went that was held, or extended by one"
        self.forget(gone)
        for key in self.published:
            assert self.parents[key] is None or self.parents[key] in self.published, "a page went before its children"
        self.to_evict = 0

    def forget(self, keys):
        for key in keys:
            self.names.pop(self.published.pop(key), None)

    def rename(self, fresh, page):
        if fresh in self.names:
            key = self.names[page] = self.names.pop(fresh)
            if self.published.get(key) is fresh:
                self.published[key] = page
