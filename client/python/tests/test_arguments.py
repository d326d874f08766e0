"""What a caller gets wrong is told, by the name of the argument, its value and its limit; and nothing is changed."""
from __future__ import annotations

import signal
import unittest
import unittest.mock

from support import HAS_NUMPY, PoolTest, needs_numpy

import kvpool

if HAS_NUMPY:
    import numpy

INVALID = kvpool.InvalidArgument


class Arguments(PoolTest):
    def told(self, *cases) -> None:
        """Each case: what is raised, what its text says, the call."""
        for kind, text, call in cases:
            with self.subTest(text), self.assertRaisesRegex(kind, text):
                call()

    def test_of_specs(self) -> None:
        def make(**change):
            return lambda: self.pool(**{"kv_heads": 1, "head_dim": 8, **change})

        self.told(
            (INVALID, "name 'a.x00b' has a zero byte", make(name="a\0b")),
            (INVALID, "name '.udc80' is no Unicode text", make(name="\udc80")),
            (TypeError, "name is a int; it must be a str", make(name=5)),
            (TypeError, "pages is a float; it must be an integer", make(pages=1.5)),
            (INVALID, "pages -1 is not in 0..4294967295", make(pages=-1)),
            (INVALID, "layers 0 is not in 1..1024", make(layers=0)),
            (INVALID, "layers 1073741824 is not in 1..1024", make(layers=1 << 30)),
            (INVALID, "region_bytes 1180591620717411303424 is not in", make(region_bytes=1 << 70)),
            (INVALID, "region_bytes -1 is not in", make(region_bytes=-1)),
            (kvpool.NoDevice, 'devices.0.: "cuda:0"', make(devices="cuda:0")),
            (TypeError, "the spec is a dict", lambda: self.client.create_pool({"name": "p"})))
        self.made.clear()

    def test_of_connecting_and_claiming(self) -> None:
        self.told(
            (INVALID, "connect_ms -1 is not in 0..", lambda: kvpool.connect("/nowhere", connect_ms=-1)),
            (INVALID, "'host' is of an embedded daemon", lambda: kvpool.connect("/nowhere", backend="host")),
            (INVALID, "kvpool.sock.x00x' has a zero byte", lambda: kvpool.connect(self.client.endpoint + "\0x")),
            (INVALID, "resume_secret is empty", lambda: self.client.claim(b"")),
            (TypeError, "resume_secret is a str", lambda: self.client.claim("secret")),
            (TypeError, "name is a int", lambda: self.client.attach(5)),
            (INVALID, "join -1 is not in", lambda: self.client.attach("p", join=-1)))

    def test_of_pools(self) -> None:
        pool = self.pool(region_bytes=65536)
        self.told(
            (TypeError, "plane is a float", lambda: pool.plane(0.5)),
            (INVALID, "rank -1 is not in", lambda: pool.plane(0, -1)),
            (TypeError, "key is a NoneType", lambda: pool.open(None)),
            (INVALID, "key 18446744073709551616 is not in", lambda: pool.open(1 << 64)),
            (TypeError, "a block key is a str", lambda: pool.open(1, blocks=["x" * 8])),
            (TypeError, "extra is a str", lambda: pool.open(1, tokens=[1], extra="x")),
            (INVALID, "lease_ms 1125899906842624 is not in 1..", lambda: pool.pin([1], lease_ms=1 << 50)),
            (INVALID, "pages 1180591620717411303424 is not in 1..", lambda: pool.evict(1 << 70)),
            (INVALID, "timeout_ms -1 is not in", lambda: pool.wait(kvpool.Point(1, 0), -1)),
            (INVALID, "name 'a.x00' has a zero byte", lambda: pool.region("a\0", 10)),
            (INVALID, "nbytes -1 is not in", lambda: pool.region("a", -1)),
            (INVALID, "from_slot -1 is not in", lambda: next(pool.sequences(from_slot=-1))),
            (INVALID, "limit -1 is not in", lambda: next(pool.sequences(limit=-1))))
        self.assertEqual((list(pool.sequences()), pool.regions()), ([], []))
        pool.open(1)
        self.assertEqual([len(list(pool.sequences(limit=n))) for n in (0, 1, 2)], [0, 1, 1])

    def test_of_points(self) -> None:
        """One that wrapped would be another that has been reached."""
        pool = self.pool()
        timeline, value = pool.signal()
        seq = pool.open(1)
        self.told(
            (INVALID, f"value {(1 << 64) + value} is not in", lambda: pool.wait((timeline, (1 << 64) + value), 1)),
            (INVALID, "value -1 is not in", lambda: pool.wait_on(kvpool.Point(timeline, -1))),
            (INVALID, f"timeline {(1 << 32) + timeline} is not in", lambda: seq.close(after=((1 << 32) + timeline, 1))),
            (TypeError, "a point is a kvpool.Point, not 5", lambda: pool.wait(5)),
            (TypeError, "value is a float", lambda: seq.transfer(self.client.session.session_id, when=(timeline, 1.5))))
        self.assertFalse(seq.closed)

    def test_of_arrays_in_regions(self) -> None:
        region = self.pool(region_bytes=65536).region("r", 4096)
        self.told(
            (TypeError, r"shape\[0\] is a float", lambda: region.array((1.5, 2))),
            (INVALID, r"shape\[1\] -1 is not in", lambda: region.array((4, -1))),
            (INVALID, r"shape\[1\] 1180591620717411303424 is not in", lambda: region.array((0, 1 << 70))),
            (INVALID, "are 18446744073709551616 bytes, not within the 4096", lambda: region.array((1 << 62, 4))),
            (INVALID, "offset -1 is not in", lambda: region.array((4,), offset=-1)),
            (TypeError, "offset is a float", lambda: region.array((4,), offset=1.0)))
        region.drop()

    def test_of_sequences(self) -> None:
        pool = self.pool()
        seq = pool.open(1)
        seq.reserve(8)
        self.told(
            (TypeError, "tokens is a float", lambda: seq.reserve(1.5)),
            (INVALID, "tokens -1 is not in", lambda: seq.reserve(-1)),
            (INVALID, r"reserved\[1\] -2 is not in", lambda: pool.advance([seq, seq], [1, -2])),
            (TypeError, r"reserved\[0\] is a str", lambda: pool.advance([seq], ["8"])),
            (TypeError, "a int stands among the sequences", lambda: pool.advance([5], [8])),
            (INVALID, "session id -1 is not in", lambda: seq.transfer(-1)),
            (INVALID, "first -1 is not in", lambda: seq.publish([1, 2, 3, 4], first=-1)),
            (INVALID, r"tokens\[0\] 4294967295 is not in 0..128", lambda: pool.page_table([seq], [0xFFFFFFFF])),
            (INVALID, r"tokens\[0\] 4294967295 is not in 0..128", lambda: pool.batch_indices([seq], [0xFFFFFFFF])))
        self.assertEqual((seq.reserved, len(seq.pages)), (8, 2))

    def test_numbers_may_be_bytes(self) -> None:
        """Of which an array would make one number out of four."""
        pool = self.pool()
        seqs = pool.open_many(range(4))
        pool.advance(seqs, b"\4\1\0\7")
        self.assertEqual([seq.reserved for seq in seqs], [4, 1, 0, 7])
        indptr, *_ = pool.page_table(seqs, bytearray((4, 1, 0, 7)))
        self.assertEqual(list(indptr), [0, 1, 2, 2, 4])

    @needs_numpy
    def test_a_sequence_is_appended_to_once_a_batch(self) -> None:
        pool = self.pool(dtype="float32")
        seq, k = pool.open(1), numpy.ones((2, 2, 8), "float32")
        with self.assertRaisesRegex(INVALID, "stands twice"):
            pool.append([seq, seq], k, k)
        self.assertEqual(len(seq), 0)


@needs_numpy
class Unfinished(PoolTest):
    def test_an_advance_that_nobody_waited_for_is_no_surprise_to_what_comes_next(self) -> None:
        """As when Ctrl-C comes between its two halves."""
        pool = self.pool(dtype="float32")
        seq, k = pool.open(1), numpy.ones((3, 2, 8), "float32")
        seq.append(k, k)
        pool.advance_begin([seq], [16])
        self.assertEqual(seq.append(k, k), 6)
        self.assertEqual(seq.reserved, 16)
        left = pool.advance_begin([seq], [20])
        pool.detach()
        with self.assertRaisesRegex(kvpool.SessionEnded, "detached"):
            left.wait()

    def test_a_copy_that_ctrl_c_kept_back_is_carried_out_by_the_next_append(self) -> None:
        pool = self.pool(dtype="float32", page_size=4)
        seq, k = pool.open(1), numpy.broadcast_to(numpy.arange(16, dtype="f4")[:, None, None], (16, 2, 8))
        seq.append(k, k)
        with unittest.mock.patch.object(pool._steps, "copy", side_effect=KeyboardInterrupt):
            for interrupted in (lambda: seq.truncate(6), lambda: seq.append(k[6:7], k[6:7])):
                with self.assertRaises(KeyboardInterrupt):
                    interrupted()
        self.assertEqual(seq.append(k[6:7], k[6:7]), 7)
        held = pool.plane(0).numpy()[seq.pages].reshape(-1, 2, 8)[:7]
        self.assertEqual(held.tolist(), k[:7].tolist())
        del held

    def test_a_copy_that_is_owed_by_a_sequence_that_came_by_transfer_is_carried_out(self) -> None:
        pool, k = self.pool(dtype="float32", page_size=4), numpy.arange(16, dtype="f4").repeat(16).reshape(16, 2, 8)
        with kvpool.connect(self.client.endpoint) as client, client.attach(pool.name) as there:
            for key, blocks in ((1, None), (2, [b"page no %d" % i for i in range(4)])):
                seq = pool.open(key)
                seq.append(k, k)
                if blocks:
                    seq.publish(blocks=blocks)
                with unittest.mock.patch.object(pool._steps, "copy", side_effect=KeyboardInterrupt):
                    for interrupted, tokens in ((seq.truncate, 6), (seq.reserve, 8)):
                        with self.assertRaises(KeyboardInterrupt):
                            interrupted(tokens)
                seq.transfer(client.session.session_id)
                came = there.open(key, blocks=blocks)
                self.assertEqual(came.append(k[6:7], k[6:7]), 7)
                held = there.plane(0).numpy()[came.pages].reshape(-1, 2, 8)[:7]
                self.assertEqual(held.tolist(), k[:7].tolist())
                del held

    def test_ctrl_c_at_any_moment_leaves_a_sequence_to_go_on_with(self) -> None:
        pool = self.pool(dtype="float32")
        seq, hits, inside = pool.open(1), 0, False

        def work() -> None:
            nonlocal inside
            while True:
                inside = True
                length = len(seq)
                if length > 90:
                    seq.truncate(hits % 9)
                    continue
                count = 1 + length % 4
                values = numpy.arange(length, length + count, dtype="f4")
                k = numpy.broadcast_to(values[:, None, None], (count, 2, 8))
                seq.append(k, k)

        def interrupt(*_: object) -> None:
            nonlocal inside
            if inside:
                inside = False
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0011)
        while hits < 100:
            try:
                work()
            except KeyboardInterrupt:
                hits += 1
            finally:
                inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        held = pool.plane(0).numpy()[seq.pages].reshape(-1, 2, 8)[: len(seq)]
        self.assertTrue((held == numpy.arange(len(seq))[:, None, None]).all())
        del held


class AttachedTwice(PoolTest):
    def test_it_is_the_same_pool(self) -> None:
        pool = self.pool(model="llama")
        seq = pool.open(1)
        self.assertIs(self.client.create_pool(pool.info.spec), pool)
        self.assertIs(self.client.attach(pool.name, model="llama", layout_digest=pool.info.layout_digest), pool)
        with self.assertRaises(kvpool.LayoutMismatch):
            self.client.attach(pool.name, model="other")
        with self.assertRaisesRegex(kvpool.Busy, "attached by this client already"):
            self.client.attach(pool.name, metadata_only=True)
        seq.reserve(4)
        pool.detach()
        self.assertIsNot(self.client.attach(pool.name), pool)


if __name__ == "__main__":
    unittest.main()
