"""Two clients of one daemon, driven by hypothesis, beside a model that keeps each sequence's tokens in a list.

After every step each sequence has the model's length and bytes, and the pages that are not free are those that the rows
name, and those that a row copied from, which the daemon holds until it next looks at that sequence. $KVPOOL_TEST_LONG:
many more programs, and new ones each time.
"""
from __future__ import annotations

import atexit
import importlib.util
import itertools
import os
import shutil
import tempfile
import unittest

from support import HAS_NUMPY

import kvpool

HAS_HYPOTHESIS = importlib.util.find_spec("hypothesis") is not None
LONG = bool(os.environ.get("KVPOOL_TEST_LONG"))
PAGES, PAGE, HEADS, DIM = 24, 4, 2, 8

if HAS_HYPOTHESIS and HAS_NUMPY:
    import numpy
    from hypothesis import HealthCheck, configuration, settings
    from hypothesis import strategies as st
    from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

    configuration.set_hypothesis_home_dir(home := tempfile.mkdtemp(prefix="kvpool-hypothesis-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    names = itertools.count()

    class Line:
        """A sequence: whose it is, its handle there, its tokens as the model has them, and whether the page that its
        tail was copied from may still be held."""

        def __init__(self, owner: int, seq: kvpool.Sequence, tokens: list[int], copied: bool = False) -> None:
            self.owner, self.seq, self.tokens, self.copied = owner, seq, tokens, copied

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.clients = [kvpool.connect(backend="host") for _ in range(2)]
            spec = kvpool.PoolSpec(f"stateful-{os.getpid()}-{next(names)}", PAGES, PAGE, layers=2, kv_heads=HEADS,
                                   head_dim=DIM, dtype="float32", max_sequence_tokens=PAGES * PAGE)
            self.pools = [client.create_pool(spec) for client in self.clients]
            self.arrays = [plane.numpy() for plane in self.pools[0].layer(1)]
            self.lines: list[Line] = []
            self.keys, self.values = itertools.count(), itertools.count(1)

        def teardown(self) -> None:
            for line in self.lines:
                line.seq.close()
            assert self.pools[0].free_pages == PAGES
            assert self.clients[0].audit() == []
            name = self.pools[0].name
            self.arrays.clear()
            for client in self.clients:
                client.close()
            with kvpool.connect(backend="host") as last:
                last.delete_pool(name)

        def pick(self, number: int) -> Line:
            return self.lines[number % len(self.lines)]

        def write(self, lines: list[Line], counts: list[int]) -> None:
            """Append to sequences of one client: all of it, or nothing and OutOfPages."""
            new = [[next(self.values) for _ in range(count)] for count in counts]
            flat = numpy.array([value for values in new for value in values], dtype="float32")
            k = numpy.broadcast_to(flat[:, None, None], (len(flat), HEADS, DIM))
            both = numpy.stack([k, 2 * k])  # a layer each
            pool, free = self.pools[lines[0].owner], self.pools[0].free_pages
            short = sum(max(-(-(len(line.tokens) + count) // PAGE) - len(line.seq.pages), 0)
                        for line, count in zip(lines, counts))
            try:
                pool.append([line.seq for line in lines], both, -both, tokens=counts)
            except kvpool.OutOfPages as error:
                assert error.missing == short - free > 0
                return
            assert short <= free
            for line, values in zip(lines, new):
                line.tokens += values

        @rule(owner=st.integers(0, 1))
        def open(self, owner: int) -> None:
            self.lines.append(Line(owner, self.pools[owner].open(next(self.keys)), []))

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99), count=st.integers(1, 3 * PAGE))
        def append(self, which: int, count: int) -> None:
            line = self.pick(which)
            if len(line.tokens) + count <= PAGES * PAGE:
                self.write([line], [count])

        @precondition(lambda self: self.lines)
        @rule(owner=st.integers(0, 1), counts=st.lists(st.integers(0, 5), min_size=1, max_size=4))
        def append_to_several(self, owner: int, counts: list[int]) -> None:
            lines = [line for line in self.lines if line.owner == owner][: len(counts)]
            counts = counts[: len(lines)]
            if lines and sum(counts) and all(len(line.tokens) + 5 <= PAGES * PAGE for line in lines):
                self.write(lines, counts)

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99), more=st.integers(0, 2 * PAGE))
        def reserve(self, which: int, more: int) -> None:
            line, free = self.pick(which), self.pools[0].free_pages
            wanted = min(len(line.tokens) + more, PAGES * PAGE)
            short = -(-wanted // PAGE) - len(line.seq.pages)
            try:
                line.seq.reserve(wanted)
            except kvpool.OutOfPages as error:
                assert error.missing == short - free > 0
                return
            assert line.seq.reserved >= wanted

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99), keep=st.integers(0, PAGES * PAGE))
        def truncate(self, which: int, keep: int) -> None:
            line, free = self.pick(which), self.pools[0].free_pages
            keep %= len(line.tokens) + 1
            try:
                line.seq.truncate(keep)
            except kvpool.OutOfPages as error:  # a full page is never written again: it takes another for its tail
                assert (error.missing, free) == (1, 0)
                return
            del line.tokens[keep:]
            line.copied = keep % PAGE != 0
            assert len(line.seq.pages) == -(-keep // PAGE)

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99), keep=st.integers(0, PAGES * PAGE))
        def fork(self, which: int, keep: int) -> None:
            line, free = self.pick(which), self.pools[0].free_pages
            keep %= len(line.tokens) + 1
            try:
                child = line.seq.fork(next(self.keys), keep)
            except kvpool.OutOfPages as error:
                assert (error.missing, free) == (1, 0)
                return
            assert child.pages[: keep // PAGE] == line.seq.pages[: keep // PAGE]
            self.lines.append(Line(line.owner, child, line.tokens[:keep], keep % PAGE != 0))

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99))
        def transfer(self, which: int) -> None:
            line = self.pick(which)
            to = 1 - line.owner
            key = line.seq.key
            line.seq.transfer(self.clients[to].session.session_id)
            line.owner, line.seq = to, self.pools[to].open(key)

        @precondition(lambda self: self.lines)
        @rule(which=st.integers(0, 99))
        def close(self, which: int) -> None:
            line = self.pick(which)
            line.seq.close()
            self.lines.remove(line)

        @invariant()
        def lengths_and_bytes_are_the_models(self) -> None:
            for line in self.lines:
                assert len(line.seq) == len(line.tokens)
                wanted = 2 * numpy.array(line.tokens, dtype="float32")[:, None, None]
                for array, sign in zip(self.arrays, (1, -1)):
                    held = array[line.seq.pages].reshape(-1, HEADS, DIM)[: len(line.tokens)]
                    assert (held == sign * wanted).all()

        @invariant()
        def pages_that_are_not_free_are_in_a_row(self) -> None:
            held = {page for line in self.lines for page in line.seq.pages}
            copied_from = sum(line.copied for line in self.lines)
            assert PAGES - len(held) - copied_from <= self.pools[0].free_pages <= PAGES - len(held)

    Machine.TestCase.settings = settings(
        max_examples=400 if LONG else 12, stateful_step_count=40, deadline=None, database=None, derandomize=not LONG,
        suppress_health_check=list(HealthCheck))

    class Stateful(Machine.TestCase):
        """Named as other tests are."""

else:

    @unittest.skip("hypothesis and numpy are not installed")
    class Stateful(unittest.TestCase):
        def runTest(self) -> None:
            pass


if __name__ == "__main__":
    unittest.main()
