"""ruff and mypy over the package, where they are installed."""
from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

FOLDER = pathlib.Path(__file__).resolve().parents[1]


def command(name: str) -> list[str] | None:
    if importlib.util.find_spec(name) is not None:
        return [sys.executable, "-m", name]
    return [name] if shutil.which(name) else None


class Quality(unittest.TestCase):
    def clean(self, *arguments: str) -> None:
        done = subprocess.run(arguments, cwd=FOLDER, capture_output=True, text=True, timeout=300)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)

    @unittest.skipUnless(command("ruff"), "ruff is not installed")
    def test_ruff_finds_nothing(self) -> None:
        self.clean(*command("ruff") or [], "check", "--no-cache", ".")

    @unittest.skipUnless(command("mypy"), "mypy is not installed")
    def test_the_package_is_strictly_typed(self) -> None:
        with tempfile.TemporaryDirectory() as cache:
            self.clean(*command("mypy") or [], "--strict", "--cache-dir", cache)


if __name__ == "__main__":
    unittest.main()
