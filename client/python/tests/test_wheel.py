"""The wheel works without anything else of kvpool, and of the packages that it was built with."""
from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import zipfile

from support import HAS_NUMPY

FOLDER = pathlib.Path(__file__).resolve().parents[1]
BUILD = pathlib.Path(os.environ.get("KVPOOL_BIN_DIR", "/nowhere")).parent
SMALL = """
import kvpool
with kvpool.connect(backend="host") as client:
    with client.create_pool(kvpool.PoolSpec("p", 4, 4, kv_heads=1, head_dim=8)) as pool:
        print(kvpool.__file__, pool.free_pages)
    print(client.endpoint)
"""


@unittest.skipUnless(sys.version_info >= (3, 11), "make_wheel.py needs Python 3.11")
@unittest.skipUnless((BUILD / "CMakeCache.txt").exists(), "$KVPOOL_BIN_DIR is not of a build folder")
@unittest.skipUnless(shutil.which("patchelf") and shutil.which("objdump"), "patchelf and binutils are not installed")
class Wheel(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix="kvpool-wheel-"))
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        made = subprocess.run([sys.executable, str(FOLDER / "make_wheel.py"), str(BUILD), str(cls.folder)], check=True,
                              capture_output=True, text=True).stdout.strip()
        cls.wheel = pathlib.Path(made)
        cls.environment = {name: value for name, value in os.environ.items()
                           if not name.startswith(("KVPOOL_", "PYTHON"))}

    def run_small(self, program: str, place: pathlib.Path, **environment: str) -> None:
        done = subprocess.run([program, "-c", SMALL], env={**self.environment, **environment, "PATH": "/nowhere"},
                              capture_output=True, text=True, timeout=60, cwd=self.folder)
        *printed, endpoint = done.stdout.split() or [done.stderr]
        self.assertEqual(printed, [f"{place}/kvpool/__init__.py", "4"], done.stderr)
        self.assertFalse(os.path.exists(os.path.dirname(endpoint)), "the daemon's folder is left")

    def test_an_unpacked_wheel_embeds_its_own_daemon_with_its_own_libraries(self) -> None:
        place = self.folder / "unpacked"
        with zipfile.ZipFile(self.wheel) as archive:
            self.assertIsNone(archive.testzip())
            names = archive.namelist()
            for entry in archive.infolist():
                path = archive.extract(entry, place)
                os.chmod(path, entry.external_attr >> 16 & 0o777)
            record = archive.read(names[-1]).decode()
        self.assertEqual([line.split(",")[0] for line in record.splitlines()], names)
        self.assertIn("kvpool/hf/cache.py", names)
        for name in ("libkvpool.so.0", "bin/kvpoold", "bin/kvpool-exec"):
            found = subprocess.run(["ldd", str(place / "kvpool" / name)], check=True, capture_output=True, text=True)
            for line in found.stdout.splitlines():
                if "=>" in line and str(place) not in line:
                    self.assertRegex(line.split()[0], r"^(libc|libm|libdl|libpthread|librt|libresolv)\.so")
        self.run_small(sys.executable, place, PYTHONPATH=str(place))

    def test_the_tag_names_the_glibc_that_the_programs_ask_for(self) -> None:
        with zipfile.ZipFile(self.wheel) as archive, tempfile.TemporaryDirectory() as folder:
            names = [name for name in archive.namelist() if ".so" in name or "/bin/" in name]
            programs = [archive.extract(name, folder) for name in names]
            asked = [re.findall(r"GLIBC_2\.(\d+)", subprocess.run(
                ["objdump", "-T", path], check=True, capture_output=True, text=True).stdout) for path in programs]
        newest = max(int(version) for versions in asked for version in versions)
        self.assertRegex(self.wheel.name, rf"-py3-none-manylinux_2_{newest}_\w+\.whl$")

    @unittest.skipUnless(importlib.util.find_spec("ensurepip"), "python3-venv is not installed")
    def test_installed_in_a_fresh_environment_the_readmes_first_example_runs(self) -> None:
        place = self.folder / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(place)], check=True,
                       env=self.environment)
        program = str(place / "bin/python")
        subprocess.run([program, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--force-reinstall",
                        str(self.wheel)], check=True, env=self.environment)
        site = next(place.glob("lib/python3*/site-packages"))
        self.run_small(program, site)
        if HAS_NUMPY:
            example = (FOLDER / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
            done = subprocess.run([program, "-c", example], env=self.environment, capture_output=True, text=True,
                                  timeout=60, cwd=self.folder)
            if "No module named 'numpy'" not in done.stderr:  # it is this environment's, not the system's
                self.assertIn("64 of 64 pages are free again", done.stdout, done.stderr)


if __name__ == "__main__":
    unittest.main()
