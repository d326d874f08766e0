"""What the tests share: who may run, a client, and naive references.

Run by `python3 -m unittest discover -s client/python/tests`, with $KVPOOL_LIBRARY, $KVPOOL_BIN_DIR and PYTHONPATH set.
The tests share an embedded daemon on the host backend, which ends with the test process.
"""
from __future__ import annotations

import gc
import importlib.util
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest

import kvpool

# Of random tests: $KVPOOL_TEST_SEED, or 1, or in long runs ($KVPOOL_TEST_LONG) any.
SEED = int(os.environ.get("KVPOOL_TEST_SEED", "0")) or (
    random.SystemRandom().randrange(1, 1 << 32) if os.environ.get("KVPOOL_TEST_LONG") else 1)

HAS_NUMPY = importlib.util.find_spec("numpy") is not None
HAS_TORCH = importlib.util.find_spec("torch") is not None and not os.environ.get("KVPOOL_TEST_NO_TORCH")
HAS_HF = HAS_TORCH and importlib.util.find_spec("transformers") is not None

needs_numpy = unittest.skipUnless(HAS_NUMPY, "numpy is not installed")
needs_torch = unittest.skipUnless(HAS_TORCH and HAS_NUMPY, "torch is not installed")


def has_gpu() -> bool:
    if not HAS_TORCH:
        return False
    import torch

    return torch.cuda.is_available()


_names = iter(range(1 << 30))


class PoolTest(unittest.TestCase):
    """A client of this test's own, and pools that are deleted after it. The ledger must be clean in the end."""

    backend = "host"

    def setUp(self) -> None:
        self.client = kvpool.connect(backend=self.backend)
        self.made: list[str] = []

    def tearDown(self) -> None:
        self.client.close()
        gc.collect()  # a tensor in a cycle holds its pool
        with kvpool.connect(backend=self.backend) as last:
            self.assertEqual(last.audit(), [])
            for name in self.made:
                last.delete_pool(name)

    def pool(self, **geometry) -> kvpool.Pool:
        standard = {"kv_heads": 2, "head_dim": 8} if not {"ckv_dim", "planes", "kv_heads"} & set(geometry) else {}
        spec = {"name": f"test-{os.getpid()}-{next(_names)}", "pages": 32, "page_size": 4, **standard, **geometry}
        self.made.append(spec["name"])
        return self.client.create_pool(kvpool.PoolSpec(**spec))


class Kept:
    """A daemon under kvpool-keeper, which keeps its memory and starts it again when it is killed."""

    def __init__(self, backend: str) -> None:
        programs = os.environ["KVPOOL_BIN_DIR"]
        self.folder = tempfile.mkdtemp(prefix="kvpool-kept-")
        self.endpoint = os.path.join(self.folder, "kvpool.sock")
        with open(os.path.join(self.folder, "log"), "wb") as log:
            self.keeper = subprocess.Popen(
                [os.path.join(programs, "kvpool-keeper"), "--", os.path.join(programs, "kvpoold"), "--runtime-dir",
                 self.folder, "--backend", backend], stdout=log, stderr=log)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.terminate()
        try:
            self.keeper.wait(30)
        finally:
            self.keeper.kill()
            shutil.rmtree(self.folder)

    def kill_daemon(self) -> None:
        """Returns when it is gone; its keeper starts another."""
        with open(f"/proc/{self.keeper.pid}/task/{self.keeper.pid}/children") as file:
            children = file.read().split()
        for child in children:
            with open(f"/proc/{child}/comm") as file:
                name = file.read().strip()
            if name == "kvpoold":
                end = os.pidfd_open(int(child))
                os.kill(int(child), signal.SIGKILL)
                select.select([end], [], [], 30)
                os.close(end)
                return
        raise AssertionError("the keeper has no kvpoold")


def run(source: str, *arguments: str, **more) -> subprocess.CompletedProcess:
    """Another Python process with the same environment."""
    command = [sys.executable, "-c", source, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **more)
