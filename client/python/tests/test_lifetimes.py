"""Who holds what, and for how long: copies, calls that are under way while another thread closes, and the garbage
collector's order. What could crash is run in a process of its own."""
from __future__ import annotations

import copy
import gc
import importlib.util
import pickle
import unittest

from support import PoolTest, needs_numpy, run

import kvpool


class Copies(PoolTest):
    def test_what_is_connected_or_mapped_is_neither_copied_nor_pickled(self) -> None:
        pool = self.pool(region_bytes=65536)
        for held in (kvpool.connect(backend="host"), self.client, pool, pool.plane(0), pool.open(1),
                     pool.region("r", 4096)):
            for take in (copy.deepcopy, pickle.dumps):
                with (self.subTest(held=repr(held), take=take),
                      self.assertRaisesRegex(TypeError, "neither copied nor pickled")):
                    take(held)
        del held
        gc.collect()
        self.assertEqual(self.client.audit(), [])
        pool.drop_region("r")
        for plain in (pool.info, kvpool.Point(1, 2), next(pool.sequences()), self.client.session):
            self.assertEqual(pickle.loads(pickle.dumps(copy.deepcopy(plain))), plain)

    def test_errors_are_pickled_with_all_that_they_say(self) -> None:
        with self.assertRaises(kvpool.OutOfPages) as raised:
            self.pool(pages=2, max_sequence_tokens=100).open(1).reserve(100)
        again = pickle.loads(pickle.dumps(raised.exception))
        self.assertEqual((type(again), again.text, again.missing, again.status),
                         (kvpool.OutOfPages, raised.exception.text, raised.exception.missing,
                          kvpool.Status.ENOPAGES))


ROUNDS = """
import threading
import kvpool

first = kvpool.connect(backend="host")
first.create_pool(kvpool.PoolSpec("closing", pages=64, page_size=4, kv_heads=2, head_dim=8))
for number in range(20):
    client = kvpool.connect(first.endpoint)
    pool = client.attach("closing")
    ready = threading.Barrier(5)
    closed = threading.Event()

    def work(call):
        ready.wait()
        while not closed.is_set():
            try:
                call()
            except (kvpool.SessionEnded, kvpool.TimedOut):
                pass

    point = pool.signal()
    later = point._replace(value=point.value + 1)
    calls = [client.audit, lambda: list(pool.sequences()), lambda: pool.free_pages, lambda: pool.wait(later, 5)]
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    ready.wait()
    closers = [threading.Thread(target=client.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join()
    try:
        pool.check()
    except kvpool.SessionEnded:
        closed.set()
    for thread in threads:
        thread.join()
print(first.describe("closing").attachments, first.audit())  # its own
"""

FINALIZERS = """
import gc, weakref
import kvpool

class Engine:
    def __init__(self):
        self.me = self
        self.client = kvpool.connect(backend="host")
        self.pool = self.client.create_pool(
            kvpool.PoolSpec("engine", pages=64, page_size=4, kv_heads=2, head_dim=8, dtype="uint8"))
        self.seq = self.pool.open(1)
        self.seq.append(bytearray_of(4), bytearray_of(4))
        self.begun = self.pool.advance_begin([self.seq], [40])

    def __del__(self):
        for call in (lambda: self.seq.written, self.seq.close, self.pool.regions, self.client.audit):
            try:
                call()
            except kvpool.SessionEnded:
                pass

def bytearray_of(tokens):
    import numpy

    return numpy.zeros((tokens, 2, 8), "uint8")

for _ in range(8):
    engine = Engine()
    last = kvpool.connect(engine.client.endpoint)
    del engine
    gc.collect()
    print(last.describe("engine").attachments, last.audit())
    last.delete_pool("engine")
"""


FORKS = """
import os, signal, threading
import numpy
import kvpool

first = kvpool.connect(backend="host")
spec = kvpool.PoolSpec("forks", pages=64, page_size=4, kv_heads=2, head_dim=8, dtype="uint8")
k, stop, hung = numpy.zeros((3, 2, 8), "uint8"), False, 0

def connect():
    while not stop:
        kvpool.connect(backend="host").close()

def append():
    seq = pool.open(1)
    while not stop:
        if seq.append(k, k) > 40:
            seq.truncate(0)

with first.create_pool(spec) as pool:
    threads = [threading.Thread(target=work) for work in (connect, connect, append)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            raise SystemExit  # through the pool's detach and the package's end
        hung += os.waitpid(child, 0)[1] != 0
    stop = True
    for thread in threads:
        thread.join()
print(hung, first.audit())
"""


class Threads(unittest.TestCase):
    @needs_numpy
    def test_a_child_that_is_forked_beside_busy_threads_comes_to_its_end(self) -> None:
        done = run(FORKS)
        self.assertEqual((done.returncode, done.stdout), (0, "0 []\n"))

    def test_what_one_thread_closes_the_calls_of_others_may_end_with(self) -> None:
        done = run(ROUNDS)
        self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", "1 []\n"))


INTERPRETERS = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
import kvpool

first = kvpool.connect(backend="host")
pool = first.create_pool(kvpool.PoolSpec("interpreters", pages=64, page_size=4, kv_heads=2, head_dim=8))
source = f"import kvpool; pool = kvpool.connect({first.endpoint!r}).attach('interpreters'); held = pool.plane(0)"
for _ in range(3):
    other = interpreters.create()
    (interpreters.exec if hasattr(interpreters, "exec") else interpreters.run_string)(other, source)
    interpreters.destroy(other)
pool.detach()
print(first.describe("interpreters").attachments, first.audit())
"""


class Interpreters(unittest.TestCase):
    @unittest.skipUnless(importlib.util.find_spec("_interpreters") or importlib.util.find_spec("_xxsubinterpreters"),
                         "this Python has one interpreter")
    def test_one_that_ends_gives_up_what_it_had_and_no_more(self) -> None:
        done = run(INTERPRETERS)
        self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", "0 []\n"))


class Collected(unittest.TestCase):
    @needs_numpy
    def test_finalizers_in_a_cycle_with_a_client_may_still_call(self) -> None:
        done = run(FINALIZERS)
        self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", "0 []\n" * 8))


class Failed(PoolTest):
    def test_an_error_that_is_kept_keeps_no_pool_attached(self) -> None:
        pool, kept = self.pool(pages=2, max_sequence_tokens=100), []
        for call in (lambda: pool.advance([pool.open(1)], [100]), lambda: pool.plane(9),
                     lambda: pool.region("r", 1 << 40), lambda: self.client.attach(pool.name, model="other")):
            try:
                call()
            except kvpool.KvpoolError as error:
                kept.append(error)
        self.assertEqual(len(kept), 4)
        pool.detach()
        self.assertEqual(self.client.describe(pool.name).attachments, 0)


if __name__ == "__main__":
    unittest.main()
