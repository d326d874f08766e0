"""The demo: it comes out right, it finds what is made wrong, and a worker killed in the middle leaves nothing behind."""
import json
import os
import pathlib
import re
import select
import signal
import subprocess
import unittest

import cli_house
from daemon import Daemon

SMALL = ["--pages", "8", "--layers", "1", "--kv-heads", "1", "--head-dim", "8"]
KEYS = {"requests", "tokens", "hit_tokens", "peak_pages", "append_bytes_per_s", "advance_p50_us", "advance_p99_us",
        "corrupt_bytes", "leaked_pages"}
WAIT_S = 120


def children(pid):
    return [int(p) for p in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Demo(cli_house.Case):
    def tearDown(self):
        status = self.json_of("status")
        self.assertEqual(status["pools"], [])
        self.assertEqual(len(status["sessions"]), 1, "only that of the command itself")
        self.assert_clean()

    def assert_right(self, result):
        self.assertEqual(set(result), KEYS)
        self.assertEqual((result["corrupt_bytes"], result["leaked_pages"]), (0, 0))
        for key in KEYS - {"hit_tokens", "corrupt_bytes", "leaked_pages"}:
            self.assertGreater(result[key], 0, key)
        self.assertLessEqual(result["advance_p50_us"], result["advance_p99_us"])

    def test_the_built_in_workload_comes_out_right(self):
        self.assert_right(self.json_of("demo", "--seconds", "2"))

    def test_an_injected_fault_is_found_and_exits_1(self):
        result = self.json_of("demo", "--seconds", "2", "--inject-fault", code=1)
        self.assertEqual(set(result), KEYS)
        self.assertEqual((result["corrupt_bytes"], result["leaked_pages"]), (1, 1))

    def test_times_are_printed_with_the_digits_that_they_have(self):
        text = self.run_cli("--json", "demo", "--seconds", "1").stdout
        time, = re.findall(r'"advance_p50_us": ([^,\n]+)', text)
        self.assertRegex(time, r"^\d+\.\d+$")
        self.assertLessEqual(len(time), len("123.456"))

    def test_workers_that_can_not_attach_are_said_and_no_table_is_printed(self):
        for words in (("demo",), ("--json", "demo")):
            with Daemon("--set", "limits.connections=1") as daemon:  # that of the demo itself
                done = self.run_cli(*words, "--seconds", "60", code=1, endpoint=daemon.session_socket)
            self.assertIn("kvpool: connecting: ", done.stderr)
            self.assertRegex(done.stderr, r"worker \d did not attach pool demo-\d+: nothing was measured\n")
            for word in ("Advance", "leaked", "{"):
                self.assertNotIn(word, done.stdout)

    def test_the_table_says_what_it_did(self):
        text = self.run_cli("demo", "--seconds", "1").stdout
        for word in ("requests", "tokens", "pages at peak", "appended", "Advance p50", "Advance p99",
                     "corrupted bytes                0", "leaked pages                   0"):
            self.assertIn(word, text)

    def test_a_trace_is_replayed_to_its_end(self):
        trace = self.daemon.folder / "trace.jsonl"
        lines = [{"timestamp": 10 * i, "input_length": 100 + i % 20, "output_length": 5, "hash_ids": [0, 1 + i % 3]}
                 for i in range(80)]
        trace.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
        result = self.json_of("demo", "--seconds", "60", "--trace", str(trace))
        self.assert_right(result)
        self.assertEqual(result["requests"], len(lines))
        # what is not written again was found in the cache
        self.assertGreater(result["hit_tokens"], 0)
        self.assertEqual(result["tokens"] + result["hit_tokens"],
                         sum(line["input_length"] + line["output_length"] for line in lines))

    def test_prompts_with_a_common_beginning_find_it_though_all_are_asked_at_once(self):
        """6 requests of each worker: all but its first find what it wrote, 3 blocks of 64 tokens. Without, none does."""
        trace = self.daemon.folder / "trace.jsonl"
        for shared in (True, False):
            lines = [{"timestamp": 0, "input_length": 256, "output_length": 4,
                      "hash_ids": [0 if shared else 10 * i, 1 if shared else 10 * i + 1, 2 if shared else 10 * i + 2,
                                   10 * i + 3]} for i in range(12)]
            trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
            result = self.json_of("demo", "--seconds", "60", "--trace", str(trace))
            self.assertEqual((result["requests"], result["corrupt_bytes"]), (12, 0))
            self.assertLessEqual(10 * 192 if shared else 0, result["hit_tokens"])
            self.assertLessEqual(result["hit_tokens"], 11 * 192 if shared else 0)
            self.assertEqual(result["tokens"] + result["hit_tokens"], 12 * 260)

    def test_a_wrong_trace_is_refused_with_its_line(self):
        trace = self.daemon.folder / "wrong.jsonl"
        good = '{"timestamp": 0, "input_length": 100, "output_length": 5, "hash_ids": [0, 1]}\n'
        for line, text in (("nonsense\n", "line 2: it is no JSON object"),
                           (good.replace("100", "-1"), "line 2: input_length"),
                           (good.replace("5", '"5"'), "line 2: output_length"),
                           (good.replace("[0, 1]", "[0, -1]"), "line 2: hash_ids"),
                           (good.replace("[0, 1]", "[" + 90 * "0," + "0]"), "no block size")):
            trace.write_text(good + line)
            done = self.run_cli("demo", "--trace", str(trace), code=1)
            self.assertIn(text, done.stderr)
        trace.write_text("\n")
        self.assertIn("no request", self.run_cli("demo", "--trace", str(trace), code=1).stderr)
        self.run_cli("demo", "--trace", str(trace) + ".not", code=1)

    def test_wrong_options_are_refused(self):
        self.misused("demo", "--seconds", "0", text="--seconds")
        self.misused("demo", "now", text="now")

    def test_a_killed_worker_leaks_nothing_and_the_daemon_serves_on(self):
        with subprocess.Popen([self.program(), "--json", "demo", "--seconds", "60"], env=self.environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as demo:
            self.await_work(demo)
            os.kill(children(demo.pid)[0], signal.SIGKILL)
            out, err = demo.communicate(timeout=WAIT_S)
        self.assertEqual(demo.returncode, 1)
        self.assertIn(b"was killed by signal 9", err)
        result = json.loads(out)
        self.assertEqual((result["corrupt_bytes"], result["leaked_pages"]), (0, 0))
        self.assertGreater(result["tokens"], 0)

    def test_an_interrupt_ends_the_run_early_and_right(self):
        with subprocess.Popen([self.program(), "--json", "demo", "--seconds", "60"], env=self.environment(),
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as demo:
            self.await_work(demo)
            demo.send_signal(signal.SIGINT)
            out, err = demo.communicate(timeout=WAIT_S)
        self.assertEqual((demo.returncode, err), (0, b""))
        self.assertEqual(json.loads(out)["corrupt_bytes"], 0)

    def test_a_demo_that_is_killed_takes_its_workers_along(self):
        with subprocess.Popen([self.program(), "demo", "--seconds", "60"], env=self.environment(),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
            self.await_work(demo)
            workers = [os.pidfd_open(pid) for pid in children(demo.pid)]
            demo.kill()
        for worker in workers:
            ready, _, _ = select.select([worker], [], [], WAIT_S)
            self.assertEqual(ready, [worker])
            os.close(worker)
        self.await_free_pages()
        self.assertEqual(self.json_of("pool", "list")["pools"], [f"demo-{demo.pid}"])
        self.run_cli("demo", "--seconds", "1")  # the next deletes it
        self.assertEqual(self.json_of("pool", "list")["pools"], [])

    def test_only_pools_of_demos_that_are_gone_are_deleted_and_none_that_is_attached(self):
        with subprocess.Popen(["true"]) as gone:
            gone.wait()
        with subprocess.Popen(["true"]) as gone_too:
            gone_too.wait()
        kept = ["demo", "demo-", "demo--1", "demo-0", "demo-x", f"demo-{gone.pid}x", f"my-demo-{gone.pid}",
                f"demo-{os.getpid()}", f"demo-{gone_too.pid}"]
        for name in (*kept, f"demo-{gone.pid}"):
            self.run_cli("pool", "create", name, *SMALL)
        session = self.run_cli("session", "open").stdout.strip()
        self.run_cli("seq", "open", kept[-1], "1", session=session)
        self.run_cli("demo", "--seconds", "1")
        self.assertEqual(sorted(self.json_of("pool", "list")["pools"]), sorted(kept))
        self.run_cli("session", "close", session)
        self.run_cli("demo", "--seconds", "1")
        self.assertEqual(sorted(self.json_of("pool", "list")["pools"]), sorted(kept[:-1]))
        for name in kept[:-1]:
            self.run_cli("pool", "delete", name)

    def await_work(self, demo):
        """Until both workers have sequences in the demo's pool."""
        while True:
            self.assertIsNone(demo.poll(), "the demo ended early")
            status = self.json_of("status")
            busy = [s for s in status["sessions"] if s["sequences"] > 0]
            if len(busy) >= 2 and len(children(demo.pid)) == 2:
                return

    def await_free_pages(self):
        """The daemon takes dead workers' pages back by itself, to the cache or free: asking goes on until it has."""
        for _ in range(1000):
            pools = [self.json_of("pool", "show", name) for name in self.json_of("pool", "list")["pools"]]
            if all(pool["free_pages"] + pool["cache"]["cached_pages"] == pool["pages"] and pool["attachments"] == 0
                   for pool in pools):
                return
        self.fail(f"pages do not come back: {pools}")


if __name__ == "__main__":
    unittest.main()
