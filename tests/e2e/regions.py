"""Regions outlive everybody: a worker that wrote into one is killed with SIGKILL, the daemon too, and another process
finds the same bytes under the same name; what a region refuses; and what is allocated as torch does.

The workers are processes of the Python package kvpool, and write through the memory that they map.
"""
import hashlib
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
NAMES, SIZES = ["kv/0", "kv/1", "kv/2"], [4096, 70000, 1]

# Maps regions, says where and whether they existed, writes what it is told or hashes what is there, and stays.
WORKER = """
import ctypes, hashlib, json, sys, time, kvpool
client = kvpool.connect(sys.argv[1], connect_ms=20000)
pool = client.attach("p")
names, sizes, seed = json.loads(sys.argv[2])
def take(name, size):
    while True:
        try:
            return pool.region(name, size, exclusive=True)
        except kvpool.TryAgain:
            time.sleep(0.001)
regions = [take(name, size) for name, size in zip(names, sizes)]
if seed is not None:
    for i, region in enumerate(regions):
        pattern = hashlib.shake_128(f"{seed}{i}".encode()).digest(region.nbytes)
        ctypes.memmove(region.pointer, pattern, region.nbytes)
print(json.dumps([[region.offset, region.existed,
                   hashlib.sha256(ctypes.string_at(region.pointer, region.nbytes)).hexdigest()]
                  for region in regions]), flush=True)
sys.stdin.read()
"""


# As torch's allocator is called. Takes memory of these sizes, says what it was handed, writes it, and stays.
ALLOCATOR = """
import ctypes, hashlib, json, sys, kvpool
from kvpool import _abi
client = kvpool.connect(sys.argv[1], connect_ms=20000)
pool = client.attach("p")
sizes, preserve, seed = json.loads(sys.argv[2])
library = _abi.library()
assert library.kvp_torch_use(pool._owner.pointer, b"kv", preserve) == 0
memory = [library.kvp_torch_malloc(size, 0, None) for size in sizes]
print(json.dumps([library.kvp_error_text().decode(), [
    address and [library.kvp_torch_came_back(address), hashlib.sha256(ctypes.string_at(address, size)).hexdigest()]
    for address, size in zip(memory, sizes)]]), flush=True)
for address, size in zip(memory, sizes) if seed is not None else ():
    ctypes.memmove(address, hashlib.shake_128(f"{seed}{size}".encode()).digest(size), size)
print("written", flush=True)
sys.stdin.read()
"""


def written(seed, size):
    return hashlib.sha256(hashlib.shake_128(f"{seed}{size}".encode()).digest(size)).hexdigest()


class Regions(unittest.TestCase):
    def setUp(self):
        self.daemon = Daemon(keeper=True)
        self.daemon.__enter__()
        self.addCleanup(self.daemon.__exit__, None, None, None)
        self.endpoint = str(self.daemon.session_socket)
        self.environment = {**os.environ, "PYTHONPATH": str(PACKAGE), "PYTHONDONTWRITEBYTECODE": "1"}
        self.stub = Stub(self.daemon.grpc_socket, again=True)
        self.addCleanup(self.stub.close)
        self.run_python("import sys, kvpool\n"
                        "with kvpool.connect(sys.argv[1], connect_ms=20000) as client:\n"
                        "    client.create_pool(kvpool.PoolSpec(name='p', pages=4, page_size=4, kv_heads=2,\n"
                        "                                       head_dim=8, region_bytes=1 << 20))", self.endpoint)

    def run_python(self, source, *arguments):
        return subprocess.run([sys.executable, "-c", source, *arguments], env=self.environment, check=True,
                              timeout=LIMIT_S, stdout=subprocess.PIPE, text=True).stdout

    def worker(self, seed=None, names=NAMES, sizes=SIZES, kill=True):
        """What a worker saw of the regions: [offset, existed, digest] each. It is killed, or ends by itself."""
        with subprocess.Popen([sys.executable, "-c", WORKER, self.endpoint, json.dumps([names, sizes, seed])],
                              env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
            line = worker.stdout.readline()
            if kill:
                worker.kill()
        self.assertTrue(line, "the worker failed")
        return json.loads(line)

    def allocator(self, sizes, preserve, seed=None):
        """The text of its last failure, and of each allocation (came back, digest), or None. It is killed."""
        with subprocess.Popen([sys.executable, "-c", ALLOCATOR, self.endpoint, json.dumps([sizes, preserve, seed])],
                              env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            line = process.stdout.readline()
            self.assertEqual(process.stdout.readline(), b"written\n")
            process.kill()
        return json.loads(line)

    def session(self):
        return self.stub.call("OpenSession", lease_ms=60000).session

    def epoch(self):
        return self.stub.call("GetStats").epoch

    def restart(self):
        epoch, until = self.epoch(), time.monotonic() + LIMIT_S
        while not self.daemon.kill_under_keeper():
            self.assertLess(time.monotonic(), until)
        while self.epoch() != epoch + 1:
            self.assertLess(time.monotonic(), until)

    def assert_clean(self):
        self.assertTrue(self.stub.call("Audit", session=self.session()).clean)

    def test_survive_their_maker_and_the_daemon_with_the_same_bytes(self):
        written = self.worker(seed=7)
        self.assertEqual([existed for _, existed, _ in written], [False] * 3)
        for restarts in range(3):
            for _ in range(restarts):
                self.restart()
            found = self.worker(kill=restarts != 1)
            self.assertEqual(found, [[offset, True, digest] for offset, _, digest in written])
            self.assert_clean()
        names = [region.name for region in self.stub.call("DescribePool", pool="p").regions]
        self.assertEqual(names, NAMES)

    def test_are_found_in_any_order_and_rewritten(self):
        self.worker(seed=1)
        again = self.worker(seed=2, names=NAMES[::-1], sizes=SIZES[::-1])
        self.assertEqual(self.worker()[::-1], [[offset, True, digest] for offset, _, digest in again])

    def test_are_refused_over_grpc_to_another_size_and_given_up_by_their_tenant(self):
        written = self.worker(seed=3)
        session = self.session()
        with self.assertRaises(Refused) as refusal:
            self.stub.call("MapRegion", session=session, pool="p", name="kv/0", bytes=8192, call_id=1)
        self.assertEqual(refusal.exception.text,
                         'KVP_EMISMATCH: bytes: 8192, region "kv/0" of pool "p" has 4096')
        reply = self.stub.call("MapRegion", session=session, pool="p", name="kv/1", bytes=70000, call_id=2)
        self.assertEqual((reply.offset, reply.existed), (written[1][0], True))
        for i, name in enumerate(NAMES):
            self.stub.call("UnmapRegion", session=session, pool="p", name=name, call_id=3 + i)
        self.assertEqual(list(self.stub.call("DescribePool", pool="p").regions), [])
        self.assert_clean()

    def test_what_torch_allocated_comes_back_to_the_next_process_and_only_if_wanted(self):
        sizes = [4096, 70000, 123]
        self.allocator(sizes, 0, seed=1)
        self.restart()
        _, found = self.allocator(sizes, 1)
        self.assertEqual(found, [[True, written(1, size)] for size in sizes])
        text, found = self.allocator([4096, 70001], 1)
        self.assertIn('bytes: 70001, region "kv/1" of pool "p" has 70000', text)
        self.assertEqual(found, [[True, written(1, 4096)], None])
        _, found = self.allocator([*sizes, 5000], 1, seed=2)
        self.assertEqual([came_back for came_back, _ in found], [True, True, True, False])
        _, found = self.allocator([70001], 0)
        self.assertFalse(found[0][0])
        self.assertEqual([region.name for region in self.stub.call("DescribePool", pool="p").regions], ["kv/0"])
        self.assert_clean()


if __name__ == "__main__":
    unittest.main()
