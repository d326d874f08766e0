"""Sequences: room, tokens, forks, hand-over, death; and the table beside a naive model."""
from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unittest

from support import SEED, PoolTest, needs_numpy, run

import kvpool


class Room(PoolTest):
    def test_reserve_takes_pages_and_close_gives_them_back(self) -> None:
        pool = self.pool()
        with pool.open("a") as seq:
            self.assertEqual((len(seq), seq.reserved, seq.pages), (0, 0, []))
            seq.reserve(9)
            self.assertEqual((len(seq), seq.reserved, len(seq.pages), pool.free_pages), (0, 9, 3, 29))
            seq.reserve(5)
            self.assertEqual(seq.reserved, 9)
            seq.truncate(4)
            self.assertEqual((seq.reserved, len(seq.pages), pool.free_pages), (4, 1, 31))
        self.assertTrue(seq.closed)
        self.assertEqual(pool.free_pages, 32)

    def test_a_key_that_is_open_is_the_same_sequence(self) -> None:
        pool = self.pool()
        seq = pool.open("request")
        self.assertIs(pool.open("request"), seq)
        self.assertIsNot(pool.open(7), seq)
        with self.assertRaises(kvpool.InvalidArgument):
            pool.open(-1)

    def test_a_closed_sequence_is_a_StaleHandle_and_closes_again(self) -> None:
        pool = self.pool()
        seq = pool.open(1)
        seq.close()
        seq.close()
        for call in (lambda: len(seq), lambda: seq.reserve(1), lambda: seq.pages, lambda: seq.fork(2)):
            with self.assertRaises(kvpool.StaleHandle) as raised:
                call()
            self.assertEqual(raised.exception.status, kvpool.Status.ESTALE)

    def test_out_of_pages_says_how_many_are_missing_and_changes_nothing(self) -> None:
        pool = self.pool(pages=8, max_sequence_tokens=1000)
        first, second = pool.open_many([1, 2])
        first.reserve(5 * 4)
        with self.assertRaises(kvpool.OutOfPages) as raised:
            pool.advance([first, second], [6 * 4, 4 * 4])
        self.assertEqual((raised.exception.missing, raised.exception.status), (2, kvpool.Status.ENOPAGES))
        self.assertEqual((pool.free_pages, first.reserved, second.reserved), (3, 20, 0))
        second.reserve(3 * 4)
        self.assertEqual(pool.free_pages, 0)

    def test_advance_in_two_halves_overlaps_and_ends_once(self) -> None:
        pool = self.pool()
        seqs = pool.open_many([1, 2, 3])
        under_way = pool.advance_begin(seqs, [4, 8, 12])
        seqs.append(pool.open(4))
        under_way.wait()
        self.assertEqual([seq.reserved for seq in seqs], [4, 8, 12, 0])
        with self.assertRaises(kvpool.InvalidArgument):
            under_way.wait()

    def test_batches_that_do_not_fit_together_are_refused(self) -> None:
        pool, other = self.pool(), self.pool()
        for call in (lambda: pool.advance([pool.open(1)], [1, 2]), lambda: pool.advance([pool.open(1)], [-1]),
                     lambda: pool.advance([other.open(1)], [1]), lambda: pool.advance([], []),
                     lambda: pool.open_many(range(2000))):
            with self.assertRaises(kvpool.InvalidArgument):
                call()

    def test_a_point_is_reached_by_its_signal(self) -> None:
        pool = self.pool()
        point = pool.signal()
        pool.wait(point, 0)
        with self.assertRaises(kvpool.TimedOut):
            pool.wait(point._replace(value=point.value + 1), 0)
        waiter = threading.Thread(target=pool.wait, args=(point._replace(value=point.value + 1),))
        waiter.start()
        self.assertEqual(pool.signal().value, point.value + 1)
        waiter.join(30)
        self.assertFalse(waiter.is_alive())

    def test_threads_share_a_client(self) -> None:
        pool = self.pool(pages=256)
        failed: list[BaseException] = []

        def work(first: int) -> None:
            try:
                for i in range(30):
                    with pool.open(first * 1000 + i) as seq:
                        seq.reserve(8)
                        if len(seq.pages) != 2:
                            raise AssertionError(seq.pages)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual((failed, pool.free_pages), ([], 256))


class Processes(PoolTest):
    def test_a_forked_child_is_refused_and_connects_for_itself(self) -> None:
        done = run("import os, sys, kvpool\n"
                   "client = kvpool.connect(sys.argv[1])\n"
                   "pool = client.attach(sys.argv[2])\n"
                   "if os.fork() == 0:\n"
                   "    try: pool.open(1)\n"
                   "    except kvpool.SessionEnded as error: print(error)\n"
                   "    with kvpool.connect(sys.argv[1]) as own, own.attach(sys.argv[2]) as mapped:\n"
                   "        print(mapped.open(1))\n"
                   "    sys.exit(0)\n"
                   "os.wait()\n"
                   "print(pool.open(2).slot)\n", self.client.endpoint, self.pool().name)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("fork", done.stdout)
        self.assertIn("<kvpool.Sequence", done.stdout)

    def test_a_killed_process_gives_its_pages_back(self) -> None:
        pool = self.pool()
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys, kvpool\n"
             "pool = kvpool.connect(sys.argv[1]).attach(sys.argv[2])\n"
             "pool.open(1).reserve(40)\n"
             "print('there', flush=True)\n"
             "sys.stdin.read()\n", self.client.endpoint, pool.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdin is not None
        self.assertEqual(child.stdout.readline(), "there\n")
        self.assertEqual(pool.free_pages, 22)
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
        deadline = time.monotonic() + 30
        while pool.free_pages != 32 and time.monotonic() < deadline:
            os.sched_yield()
        self.assertEqual(pool.free_pages, 32)

    def test_an_embedded_daemon_ends_with_its_process_even_by_SIGKILL(self) -> None:
        for how in ("exit", "kill"):
            child = subprocess.Popen(
                [sys.executable, "-c", "import sys, kvpool\n"
                 "client = kvpool.connect(backend='host')\n"
                 "client.create_pool(kvpool.PoolSpec('p', 4, 4, kv_heads=1, head_dim=8))\n"
                 "print(client.endpoint, flush=True)\n"
                 "sys.stdin.read()\n"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert child.stdin is not None and child.stdout is not None
            folder = os.path.dirname(child.stdout.readline().strip())
            with open(os.path.join(folder, "pid")) as file:
                daemon = os.pidfd_open(int(file.read()))
            if how == "kill":
                child.send_signal(signal.SIGKILL)
            child.stdin.close()
            child.wait(60)
            child.stdout.close()
            deadline = time.monotonic() + 30
            while os.path.exists(folder) and time.monotonic() < deadline:
                os.sched_yield()
            self.assertFalse(os.path.exists(folder), how)
            with self.assertRaises(ProcessLookupError):
                signal.pidfd_send_signal(daemon, 0)
            os.close(daemon)

    def test_a_daemon_that_died_is_Disconnected_or_SessionEnded_and_then_started_anew(self) -> None:
        done = run("import os, signal, kvpool\n"
                   "client = kvpool.connect(backend='host', reconnect_ms=1)\n"
                   "pool = client.create_pool(kvpool.PoolSpec('p', 4, 4, kv_heads=1, head_dim=8))\n"
                   "kept = pool.open(7)\n"
                   "pid = int(open(os.path.dirname(client.endpoint) + '/pid').read())\n"
                   "end = os.pidfd_open(pid)\n"
                   "os.kill(pid, signal.SIGKILL)\n"
                   "import select; select.select([end], [], [])\n"
                   "try: pool.open(1)\n"
                   "except kvpool.Disconnected: print('disconnected')\n"
                   "with client, pool: pass\n"
                   "with kvpool.connect(backend='host') as again: print(again.pools())\n")
        self.assertEqual((done.stdout.split("\n")[:2], done.returncode), (["disconnected", "[]"], 0), done.stderr)


@needs_numpy
class Tokens(PoolTest):
    def tokens(self, *shape: int):
        import numpy

        return numpy.random.default_rng(self.rng.randrange(1 << 32)).standard_normal(shape).astype("float32")

    def setUp(self) -> None:
        super().setUp()
        self.rng = random.Random(SEED)

    def gather(self, seq: kvpool.Sequence, component: int, layer: int = 0):
        """What the pool's memory holds of a sequence, [tokens, heads, dim]."""
        array = seq.pool.layer(layer)[component].numpy()
        if seq.pool.info.spec.order == "HND":
            array = array.swapaxes(1, 2)
        return array[seq.pages].reshape(-1, *array.shape[2:])[: len(seq)]

    def test_appended_tokens_are_in_their_pages_in_every_layout(self) -> None:
        for order in ("NHD", "HND"):
            for placement in ("layer", "page"):
                pool = self.pool(order=order, placement=placement, layers=3, dtype="float32")
                seq = pool.open(1)
                k, v = self.tokens(3, 11, 2, 8), self.tokens(3, 11, 2, 8)
                self.assertEqual(seq.append(k[:, :6], v[:, :6]), 6)
                self.assertEqual(seq.append(list(k[:, 6:]), v[:, 6:]), 11)
                for layer in range(3):
                    self.assertTrue((self.gather(seq, 0, layer) == k[layer]).all())
                    self.assertTrue((self.gather(seq, 1, layer) == v[layer]).all())

    def test_mla_tokens_are_in_their_pages(self) -> None:
        pool = self.pool(ckv_dim=16, kpe_dim=4, joined=True, dtype="float32", layers=2)
        seq = pool.open(1)
        ckv, kpe = self.tokens(2, 5, 16), self.tokens(2, 5, 4)
        self.assertEqual(seq.append(ckv, kpe), 5)
        self.assertTrue((self.gather(seq, 0, 1) == ckv[1]).all())
        self.assertTrue((self.gather(seq, 1, 0) == kpe[0]).all())

    def test_one_token_and_arrays_with_strides_are_taken(self) -> None:
        pool = self.pool(dtype="float32")
        seq = pool.open(1)
        qkv = self.tokens(7, 3, 2, 8)  # a fused projection
        self.assertEqual(seq.append(qkv[:, 1], qkv[:, 2]), 7)
        turned = self.tokens(3, 8, 2).swapaxes(1, 2)
        self.assertEqual(seq.append(turned, turned[::-1]), 10)
        self.assertEqual(seq.append(qkv[0, 1], qkv[0, 2]), 11)
        self.assertTrue((self.gather(seq, 0)[:7] == qkv[:, 1]).all())
        self.assertTrue((self.gather(seq, 1)[7:10] == turned[::-1]).all())
        self.assertTrue((self.gather(seq, 1)[10] == qkv[0, 2]).all())

    def test_what_does_not_fit_the_pool_is_refused_and_nothing_written(self) -> None:
        pool = self.pool(dtype="float32")
        seq = pool.open(1)
        good = self.tokens(3, 2, 8)
        for k, v in ((good, good[:2]), (good.astype("float16"), good), (self.tokens(3, 3, 8), good),
                     (self.tokens(2, 3, 2, 8), good)):
            with self.assertRaises(kvpool.InvalidArgument):
                seq.append(k, v)
        with self.assertRaises(kvpool.InvalidArgument):
            seq.append(good)
        with self.assertRaises(TypeError):
            seq.append("k", good)
        self.assertEqual((len(seq), seq.reserved), (0, 0))

    def test_a_child_shares_full_pages_and_owns_its_tail(self) -> None:
        pool = self.pool(dtype="float32")
        parent = pool.open("parent")
        k, v = self.tokens(10, 2, 8), self.tokens(10, 2, 8)
        parent.append(k, v)
        child, shorter = parent.fork("child"), parent.fork("shorter", 5)
        self.assertEqual((len(child), len(shorter)), (10, 5))
        self.assertEqual((child.pages[:2], shorter.pages[:1]), (parent.pages[:2], parent.pages[:1]))
        more = self.tokens(2, 2, 8)
        child.append(more, more)
        shorter.append(more, more)
        parent.append(-more, -more)
        self.assertTrue((self.gather(parent, 0) == [*k, *-more]).all())
        self.assertTrue((self.gather(child, 0) == [*k, *more]).all())
        self.assertTrue((self.gather(shorter, 1) == [*v[:5], *more]).all())
        with self.assertRaises(kvpool.AlreadyExists):
            parent.fork("child")

    def test_a_sequence_is_handed_to_another_process_with_its_bytes(self) -> None:
        pool = self.pool(dtype="float32")
        k = self.tokens(10, 2, 8)
        seq = pool.open(77)
        seq.append(k, k)
        receiver = subprocess.Popen(
            [sys.executable, "-c", "import sys, kvpool\n"
             "with kvpool.connect(sys.argv[1]) as client, client.attach(sys.argv[2]) as pool:\n"
             "    print(client.session.session_id, flush=True)\n"
             "    sys.stdin.readline()\n"
             "    seq = pool.open(77)\n"
             "    keys = pool.plane(0).numpy()[seq.pages].reshape(-1, 2, 8)\n"
             "    seq.append(keys[:3], keys[:3])\n"
             "    keys = pool.plane(0).numpy()[seq.pages].reshape(-1, 2, 8)[:len(seq)]\n"
             "    print(len(seq), keys.astype('float64').sum())\n", self.client.endpoint, pool.name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert receiver.stdin is not None and receiver.stdout is not None
        seq.transfer(int(receiver.stdout.readline()))
        self.assertTrue(seq.closed)
        output, _ = receiver.communicate("go\n", timeout=60)
        length, total = output.split()
        self.assertEqual(int(length), 13)
        self.assertAlmostEqual(float(total), float(k.astype("float64").sum() + k[:3].astype("float64").sum()), places=3)
        self.assertEqual(pool.free_pages, 32)

    def test_a_transfer_to_nobody_is_NotFound(self) -> None:
        seq = self.pool().open(1)
        with self.assertRaises(kvpool.NotFound):
            seq.transfer(1 << 40)
        self.assertFalse(seq.closed)

    def test_random_programs_agree_with_a_naive_model(self) -> None:
        for program in range(6):
            with self.subTest(seed=SEED, program=program):
                self.random_program(random.Random(SEED + program))

    def random_program(self, rng: random.Random) -> None:
        pool = self.pool(pages=24, page_size=rng.choice([1, 3, 4, 16]), dtype="float32", layers=2,
                         max_sequence_tokens=200, order=rng.choice(["NHD", "HND"]))
        model: dict[kvpool.Sequence, list] = {}
        key = 0
        for _ in range(60):
            kind = rng.choice(["open", "append", "append", "batch", "truncate", "fork", "close", "reserve"])
            seqs = list(model)
            try:
                if kind == "open" or not seqs:
                    key += 1
                    model[pool.open(key)] = []
                elif kind == "append":
                    seq, n = rng.choice(seqs), rng.randrange(0, 9)
                    k = self.tokens(2, n, 2, 8)
                    seq.append(k, -k)
                    model[seq] += list(k.swapaxes(0, 1))
                elif kind == "batch":
                    chosen = rng.sample(seqs, rng.randrange(1, len(seqs) + 1))
                    counts = [rng.randrange(0, 4) for _ in chosen]
                    k = self.tokens(2, sum(counts), 2, 8)
                    pool.append(chosen, k, -k, tokens=counts)
                    at = 0
                    for seq, n in zip(chosen, counts):
                        model[seq] += list(k[:, at : at + n].swapaxes(0, 1))
                        at += n
                elif kind == "truncate":
                    seq = rng.choice(seqs)
                    n = rng.randrange(0, len(model[seq]) + 1)
                    seq.truncate(n)
                    del model[seq][n:]
                elif kind == "fork":
                    seq = rng.choice(seqs)
                    n = rng.choice([None, rng.randrange(0, len(model[seq]) + 1)])
                    key += 1
                    child = seq.fork(key, n)
                    model[child] = model[seq][:n]
                elif kind == "close":
                    seq = rng.choice(seqs)
                    seq.close()
                    del model[seq]
                else:
                    rng.choice(seqs).reserve(rng.randrange(0, 60))
            except kvpool.OutOfPages:
                pass
            self.compare(pool, model)
        self.assertEqual(self.client.audit(), [])

    def compare(self, pool: kvpool.Pool, model: dict) -> None:
        import numpy

        seqs = list(model)
        self.assertEqual(list(pool.seq_lens(seqs)), [len(model[seq]) for seq in seqs])
        indptr, indices, last = pool.page_table(seqs)
        arrays = [pool.plane(i).numpy() for i in range(4)]
        if pool.info.spec.order == "HND":
            arrays = [array.swapaxes(1, 2) for array in arrays]
        for i, seq in enumerate(seqs):
            tokens, pages = model[seq], indices[indptr[i] : indptr[i + 1]]
            self.assertEqual(len(pages), -(-len(tokens) // pool.page_size))
            self.assertEqual(last[i], (len(tokens) - 1) % pool.page_size + 1 if tokens else 0)
            for layer in range(2):
                wanted = numpy.array([token[layer] for token in tokens]).reshape(-1, 2, 8)
                keys, values = (array[pages].reshape(-1, 2, 8)[: len(tokens)]
                                for array in arrays[2 * layer : 2 * layer + 2])
                self.assertTrue(numpy.array_equal(keys, wanted))
                self.assertTrue(numpy.array_equal(values, -wanted))

    def test_batch_indices_name_each_tokens_place(self) -> None:
        pool = self.pool(dtype="float32")
        first, second = pool.open_many([1, 2])
        first.append(self.tokens(6, 2, 8), self.tokens(6, 2, 8))
        pool.advance([first, second], [10, 3])
        batch, positions, slots = pool.batch_indices([first, second], [2, 3])
        self.assertEqual((list(batch), list(positions)), ([0, 0, 1, 1, 1], [6, 7, 0, 1, 2]))
        self.assertEqual(list(slots), [first.pages[1] * 4 + 2, first.pages[1] * 4 + 3,
                                       *[second.pages[0] * 4 + i for i in range(3)]])
        with self.assertRaises(kvpool.InvalidArgument):
            pool.batch_indices([second], [5])

    def test_batch_indices_and_page_tables_go_over_many_pages(self) -> None:
        pool = self.pool(dtype="float32", page_size=1, pages=400, max_sequence_tokens=300)
        pool.open(9).reserve(7)
        seq = pool.open(1)
        seq.reserve(300)
        _, positions, slots = pool.batch_indices([seq], [290], [5])
        self.assertEqual((list(positions), list(slots)), (list(range(5, 295)), seq.pages[5:295]))
        indptr, indices, last = pool.page_table([seq, pool.open(9)], [300, 7])
        self.assertEqual((list(indptr), list(indices), list(last)), ([0, 300, 307], seq.pages + pool.open(9).pages,
                                                                     [1, 1]))
        self.assertEqual(pool.page_table([])[0].tolist(), [0])

    def test_out_of_pages_in_the_middle_of_an_append_writes_nothing(self) -> None:
        pool = self.pool(pages=4, max_sequence_tokens=100, dtype="float32")
        seq, other = pool.open_many([1, 2])
        k = self.tokens(10, 2, 8)
        seq.append(k, k)
        before = pool.joined_layer(0).numpy().copy()
        with self.assertRaises(kvpool.OutOfPages):
            pool.append([seq, other], self.tokens(12, 2, 8), self.tokens(12, 2, 8), tokens=[6, 6])
        self.assertEqual((len(seq), len(other)), (10, 0))
        self.assertTrue((pool.joined_layer(0).numpy() == before).all())
        other.append(k[:4], k[:4])

    def test_threads_append_fork_and_give_up_at_once(self) -> None:
        pool = self.pool(pages=512, dtype="float32")
        failed: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for i in range(20):
                    key = number * 1000 + i
                    k = numpy.full((7, 2, 8), key, "float32")
                    with pool.open(2 * key) as seq:
                        seq.append(k, -k)
                        under_way = pool.advance_begin([seq], [20])
                        with seq.fork(2 * key + 1, 5) as child:
                            under_way.wait()
                            child.append(k[:2], k[:2])
                            for line, n in ((seq, 7), (child, 7)):
                                held = self.gather(line, 0)
                                if held.shape[0] != n or not (held == key).all():
                                    raise AssertionError((key, held))
            except BaseException as error:
                failed.append(error)

        import numpy

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual((failed, [thread for thread in threads if thread.is_alive()], pool.free_pages), ([], [], 512))

    def test_a_dead_sessions_durable_sequences_are_claimed(self) -> None:
        pool = self.pool(dtype="float32", linger_ms=60_000)
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys, kvpool, numpy\n"
             "pool = kvpool.connect(sys.argv[1]).attach(sys.argv[2])\n"
             "k = numpy.ones((6, 2, 8), 'float32')\n"
             "parent = pool.open(1, durable=True)\n"
             "parent.append(k, k)\n"
             "parent.fork(3).append(k[:1], k[:1])\n"
             "pool.open(2).append(k, k)\n"
             "print(pool.client.session.resume_secret.hex(), flush=True)\n"
             "sys.stdin.read()\n", self.client.endpoint, pool.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        secret = bytes.fromhex(child.stdout.readline().decode())
        with self.assertRaises(kvpool.Busy):
            self.client.claim(secret, wait_ms=0)
        with child:
            child.kill()
        self.client.claim(secret)
        seq = pool.open(1)
        child = pool.open(3)
        self.assertEqual((len(seq), len(child), len(pool.open(2)), pool.free_pages), (6, 7, 0, 29))
        self.assertTrue((self.gather(seq, 1) == 1).all() and (self.gather(child, 1) == 1).all())
        seq.append(self.tokens(1, 2, 8), self.tokens(1, 2, 8))
        with self.assertRaises(kvpool.NotFound):
            self.client.claim(secret, wait_ms=0)

    def test_durable_sequences_are_left_by_a_closed_client(self) -> None:
        pool = self.pool(dtype="float32", linger_ms=60_000)
        seq = pool.open(5, durable=True)
        seq.append(self.tokens(4, 2, 8), self.tokens(4, 2, 8))
        seq.fork(6)
        seq.close()
        with self.assertRaises(kvpool.Busy):
            pool.detach()
        self.client.close()
        gc.collect()
        with kvpool.connect(backend="host") as other:
            self.assertEqual(other.describe(pool.name).free_pages, 31)
        self.made.remove(pool.name)  # it waits for a claim, so it can not be deleted


if __name__ == "__main__":
    unittest.main()
