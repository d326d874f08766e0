"""The wheel, unpacked as an installer does, works without anything else of kvpool."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest
import zipfile

FOLDER = pathlib.Path(__file__).resolve().parents[1]
BUILD = pathlib.Path(os.environ.get("KVPOOL_BIN_DIR", "/nowhere")).parent


@unittest.skipUnless(sys.version_info >= (3, 11), "make_wheel.py needs Python 3.11")
@unittest.skipUnless((BUILD / "CMakeCache.txt").exists(), "$KVPOOL_BIN_DIR is not of a build folder")
class Wheel(unittest.TestCase):
    def test_an_unpacked_wheel_embeds_its_own_daemon(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = subprocess.run([sys.executable, str(FOLDER / "make_wheel.py"), str(BUILD), folder], check=True,
                                  capture_output=True, text=True).stdout.strip()
            with zipfile.ZipFile(made) as archive:
                self.assertIsNone(archive.testzip())
                names = archive.namelist()
                for entry in archive.infolist():
                    path = archive.extract(entry, folder)
                    os.chmod(path, entry.external_attr >> 16 & 0o777)
                record = archive.read(names[-1]).decode()
            self.assertEqual([line.split(",")[0] for line in record.splitlines()], names)
            environment = {name: value for name, value in os.environ.items() if not name.startswith("KVPOOL_")}
            done = subprocess.run(
                [sys.executable, "-c", "import kvpool\n"
                 "with kvpool.connect(backend='host') as client:\n"
                 "    spec = kvpool.PoolSpec('p', 4, 4, kv_heads=1, head_dim=8)\n"
                 "    with client.create_pool(spec) as pool: print(kvpool.__file__, pool.free_pages)\n"
                 "    print(client.endpoint)\n"],
                env={**environment, "PYTHONPATH": folder, "PATH": "/nowhere"}, capture_output=True, text=True,
                timeout=60, cwd=folder)
            *printed, endpoint = done.stdout.split()
            self.assertEqual(printed, [f"{folder}/kvpool/__init__.py", "4"], done.stderr)
            self.assertFalse(os.path.exists(os.path.dirname(endpoint)), "the daemon's folder is left")


if __name__ == "__main__":
    unittest.main()
