"""The package as an importer meets it."""
from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from support import HAS_HF, needs_numpy, run

import kvpool

FOLDER = pathlib.Path(__file__).resolve().parents[1]


class Import(unittest.TestCase):
    def test_importing_takes_no_more_processor_time_than_asyncio_does(self) -> None:
        source = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"
        times: dict[str, list[float]] = {"kvpool": [], "asyncio": []}
        with tempfile.TemporaryDirectory() as folder:  # bytecode is written once, as an installer does
            environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
            environment.pop("PYTHONDONTWRITEBYTECODE", None)
            for _ in range(6):
                for module, taken in times.items():
                    taken.append(float(run(source.format(module), env=environment).stdout))
        self.assertLessEqual(min(times["kvpool"]), min(times["asyncio"]), times)

    def test_importing_loads_neither_numpy_nor_torch_nor_the_library(self) -> None:
        source = ("import sys, kvpool; from kvpool import _abi; "
                  "print('numpy' in sys.modules, 'torch' in sys.modules, _abi.library.cache_info().currsize)")
        self.assertEqual(run(source).stdout.split(), ["False", "False", "0"])

    def test_a_library_that_is_missing_is_named(self) -> None:
        for arguments in ("'/nowhere'", "backend='host'"):
            done = run(f"import kvpool\ntry: kvpool.connect({arguments})\nexcept OSError as e: print(e)",
                       env={**os.environ, "KVPOOL_LIBRARY": "/nowhere/libkvpool.so"})
            self.assertIn("$KVPOOL_LIBRARY", done.stdout)
            self.assertEqual(done.stderr, "")

    def test_every_public_name_is_there_and_has_a_docstring(self) -> None:
        for name in kvpool.__all__:
            self.assertTrue(getattr(kvpool, name).__doc__, name)

    def test_it_says_that_it_is_typed(self) -> None:
        self.assertTrue((FOLDER / "kvpool/py.typed").exists())


class Errors(unittest.TestCase):
    def test_nobody_listening_is_Disconnected_and_a_ConnectionError(self) -> None:
        with self.assertRaises(kvpool.Disconnected) as raised:
            kvpool.connect("/nowhere/kvpool.sock")
        self.assertIsInstance(raised.exception, ConnectionError)
        self.assertEqual(raised.exception.status, kvpool.Status.EDISCONNECTED)
        self.assertIn("/nowhere/kvpool.sock", raised.exception.text)

    def test_a_missing_kvpoold_is_said(self) -> None:
        done = run("import kvpool\ntry: kvpool.connect(backend='host')\nexcept kvpool.Disconnected as e: print(e)",
                   env={**os.environ, "KVPOOL_BIN_DIR": "/nowhere", "PATH": "/nowhere"})
        self.assertIn("KVPOOL_BIN_DIR", done.stdout)


@needs_numpy
class Examples(unittest.TestCase):
    def run_file(self, source: str) -> str:
        done = run(source)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_quickstart_runs(self) -> None:
        self.assertIn("64 of 64 pages are free again", self.run_file((FOLDER / "examples/quickstart.py").read_text()))

    def test_manager_runs(self) -> None:
        lines = self.run_file((FOLDER / "examples/manager.py").read_text()).splitlines()
        self.assertEqual(len(lines), 6)
        self.assertEqual(lines[:3], lines[3:])

    @unittest.skipUnless(HAS_HF, "torch and transformers are not installed")
    def test_the_examples_with_a_model_run(self) -> None:
        for name, last in (("llama", "the tokens are those of DynamicCache"),
                           ("prefill_decode", "the tokens are those of one process"),
                           ("crash_resume", "the tokens are those of a worker that was not killed")):
            with self.subTest(name):
                done = subprocess.run([sys.executable, str(FOLDER / f"examples/{name}.py")], capture_output=True,
                                      text=True, timeout=300)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(done.stdout.splitlines()[-1], last)

    @unittest.skipUnless(HAS_HF, "torch and transformers are not installed")
    def test_the_llama_of_the_readme_runs_as_it_is_pasted(self) -> None:
        text = (FOLDER / "README.md").read_text().partition("## transformers")[2].partition("```python\n")[2]
        source = text.partition("```")[0].replace("kvpool.connect()", 'kvpool.connect(backend="host")')
        self.assertIn("76 tokens in pages [0, 1, 2, 3, 4]", self.run_file(source))

    def test_the_readme_shows_the_quickstart(self) -> None:
        text = (FOLDER / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
        self.assertEqual(text, (FOLDER / "examples/quickstart.py").read_text().partition('"""\n')[2])


if __name__ == "__main__":
    unittest.main()
