"""kvpool replay: what it counts equals an independent simulator's, to the block, on generated traces and on real ones.

Real traces are looked for in $KVPOOL_TRACES, else in shared/traces beside the checkout. KVPOOL_TEST_LONG: those with
much room too, and every capacity of theirs against the simulator, embedded and by a daemon. KVPOOL_SANITIZED: none of
them but in long runs.
"""
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import unittest

import cli_house
import prefix_cache_simulator as simulator

KEYS = {"requests", "blocks", "hit_blocks", "block_hit_rate", "token_hit_rate", "evictions", "open_p50_us",
        "open_p99_us", "pool_blocks", "policy", "seconds"}
LONG = bool(os.environ.get("KVPOOL_TEST_LONG"))
TRACES = pathlib.Path(os.environ.get("KVPOOL_TRACES") or
                      pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "traces")

# Hit blocks of the real traces, as they were published beside them: Leaf-LRU by capacity, and with room for all.
REAL = {
    "conversation_trace": ({1000: 12847, 10000: 61046, 30000: 93978, 50000: 102290, 100000: 104924}, 105710),
    "kvct_sessions": ({2000: 690960, 5000: 1094266, 10000: 1191615, 20000: 1205147, 30000: 1209576, 50000: 1210304},
                      1210459),
}


def session_trace(seed, requests=300, block_tokens=64, floor=False):
    """Conversations that grow, fork and are asked again, over shared beginnings; several requests at a time."""
    rng = random.Random(seed)
    ids = iter(range(1 << 40))
    prompts = [[next(ids) for _ in range(rng.randint(1, 6))] for _ in range(3)]
    open_ones, trace, now = [], [], 0
    for _ in range(requests):
        now += rng.choice((0, 0, 1, 7))
        again = rng.random()
        if open_ones and again < 0.7:
            context = rng.choice(open_ones)
            if again < 0.1:
                context = context[:rng.randint(1, len(context))]
        else:
            context = list(rng.choice(prompts)) if again < 0.9 else []
        blocks = context + [next(ids) for _ in range(rng.randint(0 if context else 1, 8))]
        open_ones.append(blocks)
        if len(open_ones) > 12:
            open_ones.pop(rng.randrange(len(open_ones)))
        partial = rng.randint(1, block_tokens - 1) if rng.random() < 0.8 else 0
        length = len(blocks) * block_tokens + partial
        if partial and not floor:
            blocks = blocks + [next(ids)]
        trace.append({"timestamp": now, "input_length": length, "output_length": rng.randint(0, 99),
                      "hash_ids": blocks})
    for _ in range(requests // 10):  # asked again, word for word
        same = dict(rng.choice(trace), timestamp=rng.randint(0, now))
        trace.append(same)
    return trace


def line(timestamp, blocks, tokens=512):
    return {"timestamp": timestamp, "input_length": max(1, len(blocks) * tokens), "output_length": 1,
            "hash_ids": blocks}


class Replay(cli_house.Case):
    def setUp(self):
        self.path = self.daemon.folder / f"{self._testMethodName}.jsonl"

    def tearDown(self):
        self.assertEqual(self.json_of("pool", "list"), {"pools": []})
        self.assert_clean()

    def write(self, requests):
        self.path.write_text("".join(json.dumps(request) + "\n" for request in requests))
        return simulator.Trace.read(self.path)

    def replay(self, path, *options):
        result = self.json_of("replay", str(path), *options)
        self.assertEqual(set(result), KEYS)
        self.assertLessEqual(result["open_p50_us"], result["open_p99_us"])
        return result

    def assert_equals(self, result, trace, expected):
        self.assertEqual((result["requests"], result["blocks"]), (len(trace.requests), trace.blocks))
        self.assertEqual(result["hit_blocks"], expected.hits)
        self.assertAlmostEqual(result["block_hit_rate"], expected.block_rate, places=5)
        if expected.token_rate is None:
            self.assertIsNone(result["token_hit_rate"])
        else:
            self.assertAlmostEqual(result["token_hit_rate"], expected.token_rate, places=5)

    def compare(self, path, trace, capacity, *options):
        expected = simulator.leaf_lru(trace, capacity)
        result = self.replay(path, "--policy", "lru", "--blocks", str(capacity), *options)
        self.assert_equals(result, trace, expected)
        self.assertEqual(result["evictions"], expected.evictions)
        self.assertEqual((result["pool_blocks"], result["policy"]), (capacity, "lru"))

    def compare_both_ways(self, requests, capacities):
        trace = self.write(requests)
        for capacity in capacities:
            for where in (["--embedded"], []):
                with self.subTest(capacity=capacity, where=where):
                    self.compare(self.path, trace, capacity, *where)
        return trace

    # ---- generated traces --------------------------------------------------------------------------------------------

    def test_lru_equals_leaf_lru_on_generated_traces(self):
        for seed in range(4):
            with self.subTest(seed=seed):
                self.compare_both_ways(session_trace(seed, floor=seed % 2 == 1), (1, 2, 7, 20, 60, 250))

    def test_with_room_for_all_every_policy_equals_the_infinite_cache(self):
        trace = self.write(session_trace(7))
        for where in ([], ["--embedded"]):
            for policy in ([], ["--policy", "lru"], ["--policy", "adaptive"]):
                result = self.replay(self.path, *where, *policy)
                self.assert_equals(result, trace, simulator.infinite(trace))
                self.assertEqual((result["pool_blocks"], result["evictions"]), (trace.unique, 0))

    def test_no_policy_hits_more_than_the_offline_optimum(self):
        trace = self.write(session_trace(8))
        for capacity in (5, 20, 60):
            bound = simulator.min_pin(trace, capacity).hits
            for policy in ("lru", "adaptive"):
                result = self.replay(self.path, "--embedded", "--blocks", str(capacity), "--policy", policy)
                self.assertLessEqual(result["hit_blocks"], bound)

    def test_equal_timestamps_keep_the_order_of_the_file(self):
        self.compare_both_ways([line(5, [1, 2]), line(1, [3]), line(5, [4, 5]), line(1.5, [1, 2, 6]), line(1, [3, 7]),
                                line(5, [1, 2]), line(5, [4, 5])], (2, 3, 4))

    def test_timestamps_are_told_apart_to_the_last_bit(self):
        self.compare_both_ways([line((1 << 60) + 1, [1, 2]), line(1 << 60, [3, 4]), line((1 << 60) + 2, [3, 4])], (2,))

    def test_requests_larger_than_the_pool_keep_their_beginning(self):
        self.compare_both_ways([line(0, list(range(10))), line(1, list(range(10))), line(2, [20, 21]),
                                line(3, list(range(10))), line(4, list(range(4)) + [30, 31]),
                                line(5, list(range(10)))], (1, 3, 4, 9))

    def test_requests_without_blocks_are_served(self):
        self.compare_both_ways([{"timestamp": 0, "input_length": 63, "output_length": 0, "hash_ids": []},
                                line(1, [0, 1], 64), line(2, [0, 1], 64)], (2,))

    def test_a_block_of_unknown_size_leaves_the_token_rate_open(self):
        self.compare_both_ways([dict(line(0, [1, 2, 3]), input_length=3), line(1, [1, 2])], (3,))

    def test_more_rows_than_one_slice_lets_go_of_come_back_in_order(self):
        long = [list(range(k * 10000, k * 10000 + 1500)) for k in range(4)]
        self.compare_both_ways([line(i, long[k]) for i, k in enumerate((0, 1, 0, 2, 3, 0, 1, 2, 3, 3, 0))], (3000, 4200))

    # ---- real traces -------------------------------------------------------------------------------------------------

    def real(self, name):
        if os.environ.get("KVPOOL_SANITIZED") and not LONG:
            self.skipTest("real traces are replayed without a sanitizer")
        path = TRACES / f"{name}.jsonl"
        if not path.exists():
            self.skipTest(f"{name}: not in {TRACES}")
        return path

    def check_real(self, name):
        """The published hits of lru; those of the default policy are never less, and more with little room."""
        path, (published, infinite) = self.real(name), REAL[name]
        self.assertEqual(self.replay(path, "--embedded")["hit_blocks"], infinite)
        for capacity, hits in published.items():
            if capacity > 10000 and not LONG:
                continue
            with self.subTest(capacity=capacity):
                blocks = ["--embedded", "--blocks", str(capacity)]
                self.assertEqual(self.replay(path, *blocks, "--policy", "lru")["hit_blocks"], hits)
                adaptive = self.replay(path, *blocks)["hit_blocks"]
                self.assertGreaterEqual(adaptive, hits + (capacity <= 10000))

    def check_real_by_simulator(self, name, capacities, *where):
        path = self.real(name)
        trace = simulator.Trace.read(path)
        for capacity in capacities:
            with self.subTest(capacity=capacity):
                self.compare(path, trace, capacity, *where)

    def test_a_conversation_trace_comes_out_as_published(self):
        self.check_real("conversation_trace")

    def test_a_trace_of_coding_sessions_comes_out_as_published(self):
        self.check_real("kvct_sessions")

    def test_a_daemon_hits_the_same_on_real_traces(self):
        for name, capacity in (("conversation_trace", 1000), ("kvct_sessions", 2000)):
            path, hits = self.real(name), REAL[name][0][capacity]
            self.assertEqual(self.replay(path, "--blocks", str(capacity), "--policy", "lru")["hit_blocks"], hits)

    def test_real_traces_equal_the_simulator(self):
        for name, (published, _) in REAL.items():
            self.check_real_by_simulator(name, published if LONG else [max(published)], "--embedded")
            if LONG:
                self.check_real_by_simulator(name, published)

    # ---- the plot ----------------------------------------------------------------------------------------------------

    def test_a_plot_is_drawn_where_gnuplot_is(self):
        if shutil.which("gnuplot") is None:
            self.skipTest("there is no gnuplot here")
        self.write(session_trace(9))
        for name, magic in (("plot.png", b"\x89PNG"), ("a 'quoted' plot.svg", b"<?xml")):
            file = self.daemon.folder / name
            self.replay(self.path, "--embedded", "--plot", str(file))
            self.assertTrue(file.read_bytes().startswith(magic))
        for word in (b"offline optimum", b"infinite cache", b"adaptive", b"lru"):
            self.assertIn(word, file.read_bytes())

    def test_without_gnuplot_a_plot_is_refused_before_anything_is_replayed(self):
        self.write(session_trace(9, requests=5))
        environment = dict(self.environment(), PATH=str(self.daemon.folder))
        done = subprocess.run([self.program(), "replay", str(self.path), "--plot", "x.png"], env=environment,
                              capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("gnuplot, which is not installed", done.stderr)

    def test_names_of_files_are_no_commands_to_gnuplot(self):
        if shutil.which("gnuplot") is None:
            self.skipTest("there is no gnuplot here")
        self.path = self.daemon.folder / "a 'trace'\nsystem 'touch told-to'\n.jsonl"
        self.write([line(0, [1]), line(1, [1])])
        for name in ("|touch told-to;.png", "b'\nsystem \"touch told-to\"\n.png"):
            done = subprocess.run([self.program(), "replay", str(self.path), "--embedded", "--plot", name],
                                  cwd=self.daemon.folder, capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertTrue((self.daemon.folder / name).read_bytes().startswith(b"\x89PNG"))
        self.assertFalse((self.daemon.folder / "told-to").exists())

    def test_a_plot_that_does_not_fit_is_refused_and_nothing_of_it_stays(self):
        if shutil.which("gnuplot") is None:
            self.skipTest("there is no gnuplot here")
        self.write(session_trace(9, requests=20))
        file = self.daemon.folder / "large.svg"

        def small_files_only():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        done = subprocess.run([self.program(), "replay", str(self.path), "--embedded", "--plot", str(file)],
                              preexec_fn=small_files_only, capture_output=True, text=True)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr, f"kvpool: replay: --plot: {file} can not be written: File too large\n")
        self.assertFalse(file.exists())

    # ---- what is refused ---------------------------------------------------------------------------------------------

    def refused(self, text, *options):
        for where in ([], ["--embedded"]):
            done = self.run_cli("replay", str(self.path), *where, *options, code=1)
            self.assertIn(text, done.stderr)
            self.assertEqual(done.stdout, "")

    def test_a_wrong_trace_is_refused_with_its_line(self):
        good = json.dumps(line(0, [1, 2]))
        for text, lines in (("has no request", ["", "  "]), ("line 2: it is no JSON object", [good, "{\"timestamp\": 1"]),
                            ("line 3: hash_ids", [good, good, good.replace("[1, 2]", "[1, \"2\"]")]),
                            ("line 1: input_length is 0, must be a number of tokens from 1 to 8388608",
                             [good.replace("1024", "0")]),
                            ("line 1: input_length is 8388609", [good.replace("1024", "8388609")]),
                            ("line 1: output_length is missing", [good.replace("output_length", "out")]),
                            ("line 1: timestamp is -1, must be", [good.replace("\"timestamp\": 0", "\"timestamp\": -1")]),
                            ("line 2: hash_ids[1] is -2, must be", [good, good.replace("[1, 2]", "[1, -2]")]),
                            ("too big integer near '9223372036854775808'",
                             [good.replace("[1, 2]", "[1, 9223372036854775808]")]),
                            ("hash_ids has 2 ids, more than the 1 tokens", [good.replace("1024", "1")]),
                            ("line 2: id 2 stands behind another block", [good, json.dumps(line(1, [3, 2]))]),
                            ("line 2: id 3 stands twice", [good, json.dumps(line(1, [3, 4, 3]))]),
                            ("has 0 different blocks", [json.dumps(dict(line(0, []), input_length=9))])):
            self.path.write_text("\n".join(lines) + "\n")
            self.refused(text)
        self.path.unlink()
        self.refused("No such file")

    def test_wrong_options_are_refused(self):
        self.write([line(0, [1])])
        for options, text in ((["--blocks", "0"], "--blocks"), (["--blocks", "x"], "--blocks"),
                              (["--blocks", str((1 << 25) + 1)], "33554432"), (["--policy", "lfu"], "`lfu'")):
            self.misused("replay", str(self.path), *options, text=text)
            self.misused("replay", "--embedded", str(self.path), *options, text=text)
        self.refused("neither .png nor .svg", "--plot", "x.pdf")
        if shutil.which("gnuplot") is not None:
            self.refused("nowhere/x.png can not be written: No such file", "--plot", "nowhere/x.png")
        self.misused("replay", text="TRACE")

    def test_it_needs_no_daemon_when_embedded(self):
        trace = self.write(session_trace(3, requests=20))
        nowhere = self.daemon.folder / "nowhere.sock"
        result = self.json_of("replay", "--embedded", str(self.path), endpoint=nowhere)
        self.assert_equals(result, trace, simulator.infinite(trace))
        self.fails("KVP_EDISCONNECTED", "replay", str(self.path), endpoint=nowhere)

    # ---- runs that end early -----------------------------------------------------------------------------------------

    def await_pool(self, run):
        """Until its pool is there. @return whether the run was still under way then"""
        while run.poll() is None:
            if self.json_of("pool", "list")["pools"] == [f"replay-{run.pid}"]:
                return True
        return False

    def start_long_run(self):
        self.write(session_trace(4, requests=200) * 200)
        return subprocess.Popen([self.program(), "replay", str(self.path), "--blocks", "50"], env=self.environment(),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def test_an_interrupted_run_says_so_and_deletes_its_pool(self):
        with self.start_long_run() as run:
            self.assertTrue(self.await_pool(run))
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=cli_house.PROGRAM_S)
        self.assertEqual((run.returncode, out, err), (1, "", "kvpool: replay: interrupted\n"))

    def test_the_pool_of_a_killed_run_goes_with_the_next(self):
        with self.start_long_run() as run:
            self.assertTrue(self.await_pool(run))
            run.kill()
        while self.json_of("pool", "list")["pools"]:
            self.write(session_trace(4, requests=5))
            self.replay(self.path)


if __name__ == "__main__":
    unittest.main()
