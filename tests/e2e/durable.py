"""Durable sequences: a worker that mapped the pool and wrote tokens is killed with SIGKILL, and another process takes
what it wrote by the secret of its session, through either door, over a restart of the daemon too; or nobody does, and
after the pool's linger time the pages are free.

The worker is a process of the Python package kvpool; the claims are made by the command line tool and by Python's own
gRPC.
"""
import json
import os
import pathlib
import subprocess
import sys
import time
import unittest

from daemon import Daemon
from grpc_stub import Refused, Stub

PACKAGE = pathlib.Path(__file__).resolve().parents[2] / "client" / "python"
LIMIT_S = 60
PAGES = 32
KEYS, TOKENS = [1, 2, 3], [10, 4, 7]

WORKER = """
import ctypes, json, sys, kvpool
from kvpool import _views
class Tokens:  # [n, 2, 8] of fp16: an array, where neither numpy nor torch is installed
    def __init__(self, n):
        self.bytes = ctypes.create_string_buffer(bytes([n]) * (n * 32), n * 32)
        self._kvpool_view = _views.View(ctypes.addressof(self.bytes), (n, 2, 8), (32, 16, 2), 2, "float16", (1, 0))
client = kvpool.connect(sys.argv[1], connect_ms=20000)
pool = client.attach("p")
keys, tokens = json.loads(sys.argv[2])
seqs = pool.open_many(keys, durable=True)
other = pool.open(1000)
for seq, n in zip(seqs + [other], tokens + [5]):
    seq.append(Tokens(n), Tokens(n))
print(json.dumps([client.session.resume_secret.hex(), [seq.wire for seq in seqs]]), flush=True)
sys.stdin.read()
"""


class Durable(unittest.TestCase):
    def setUp(self):
        self.daemon = Daemon(keeper=True)
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__, None, None, None)
        self.endpoint = str(self.daemon.session_socket)
        self.environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1",
                            "KVPOOL_ENDPOINT": self.endpoint}
        self.stub = Stub(self.daemon.grpc_socket, again=True)
        self.addCleanup(self.stub.close)

    def make_pool(self, linger_ms):
        self.run_python("import sys, kvpool\n"
                        "with kvpool.connect(sys.argv[1], connect_ms=20000) as client:\n"
                        "    client.create_pool(kvpool.PoolSpec(name='p', pages=int(sys.argv[2]), page_size=4,\n"
                        "                                       kv_heads=2, head_dim=8, linger_ms=int(sys.argv[3])))",
                        self.endpoint, str(PAGES), str(linger_ms))

    def run_python(self, source, *arguments):
        subprocess.run([sys.executable, "-c", source, *arguments], env=self.environment, check=True, timeout=LIMIT_S)

    def killed_worker(self):
        """Its secret, and the handles of its durable sequences."""
        with subprocess.Popen([sys.executable, "-c", WORKER, self.endpoint, json.dumps([KEYS, TOKENS])],
                              env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
            line = worker.stdout.readline()
            worker.kill()
        secret, seqs = json.loads(line)
        return secret, seqs

    def session(self):
        return self.stub.call("OpenSession", lease_ms=60000).session

    def stats(self):
        return self.stub.call("GetStats")  # in no session: asked again and again, it would open as many as there may be

    def eventually(self, what):
        until = time.monotonic() + LIMIT_S
        while not what():
            self.assertLess(time.monotonic(), until)

    def claim_by_grpc(self, secret):
        """KVP_EBUSY until the worker is proven gone."""
        until = time.monotonic() + LIMIT_S
        while True:
            try:
                return self.stub.call("OpenSession", lease_ms=60000, resume_secret=bytes.fromhex(secret)).session
            except Refused as refused:
                if refused.status != "KVP_EBUSY" or time.monotonic() > until:
                    raise

    def claim_by_cli(self, secret):
        until = time.monotonic() + LIMIT_S
        while True:
            done = subprocess.run([os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpool"), "--json", "session", "open",
                                   "--lease-ms", "60000", "--resume", secret], env=self.environment,
                                  capture_output=True, timeout=LIMIT_S)
            if done.returncode == 0:
                return json.loads(done.stdout)["session"]
            self.assertIn(b"KVP_EBUSY", done.stderr)
            self.assertLess(time.monotonic(), until)

    def assert_claimed(self, session, seqs):
        opened = self.stub.call("OpenSequences", session=session, pool="p", keys=KEYS, call_id=1)
        self.assertEqual(list(opened.seqs), seqs)
        self.assertEqual(list(opened.written), TOKENS)
        pages = sum(-(-n // 4) for n in TOKENS)
        self.eventually(lambda: self.stats().pools[0].free_pages == PAGES - pages)  # what was not durable is gone
        self.stub.call("CloseSequences", session=session, pool="p", seqs=seqs, call_id=2)
        self.eventually(lambda: self.stats().pools[0].free_pages == PAGES)
        self.assert_clean()

    def assert_clean(self):
        self.assertTrue(self.stub.call("Audit", session=self.session()).clean)

    def assert_forgotten(self, secret):
        with self.assertRaises(Refused) as refusal:
            self.claim_by_grpc(secret)
        self.assertEqual(refusal.exception.status, "KVP_ENOENT")

    def restart(self):
        epoch = self.stats().epoch
        self.eventually(self.daemon.kill_under_keeper)
        self.eventually(lambda: self.stats().epoch == epoch + 1)

    def test_are_claimed_over_grpc(self):
        self.make_pool(600000)
        secret, seqs = self.killed_worker()
        self.assert_claimed(self.claim_by_grpc(secret), seqs)
        self.assert_forgotten(secret)

    def test_are_claimed_by_the_command_line_tool(self):
        self.make_pool(600000)
        secret, seqs = self.killed_worker()
        self.assert_claimed(self.claim_by_cli(secret), seqs)

    def test_are_claimed_after_the_daemon_was_killed_too(self):
        self.make_pool(600000)
        for claim in (self.claim_by_grpc, self.claim_by_cli):
            secret, seqs = self.killed_worker()
            self.restart()
            session = claim(secret)
            self.restart()
            self.assert_claimed(session, seqs)

    def test_are_gone_after_the_linger_time(self):
        self.make_pool(300)
        for restart in (False, True):
            secret, _ = self.killed_worker()
            if restart:
                self.restart()
            self.eventually(lambda: self.stats().pools[0].free_pages == PAGES)
            self.assert_forgotten(secret)
            self.assert_clean()


if __name__ == "__main__":
    unittest.main()
