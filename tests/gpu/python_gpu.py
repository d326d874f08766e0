#!/usr/bin/env python3
"""The Python package's tests on a GPU, by whatever python3 has torch: those of python/tests/test_*_gpu.py beside this
file's folder. A line a test, "passed NAME", "FAILED NAME" or "skipped NAME: why", and last the three counts; exit status
77 where all were skipped.

    python_gpu.py [MODULE[.CLASS[.TEST]]…]      by default all
"""
import os
import pathlib
import sys
import unittest

FOLDER = pathlib.Path(__file__).absolute().parents[1]
PACKAGE = FOLDER / "python"


class Lines(unittest.TestResult):
    """Prints what comes of each test, and counts."""

    def __init__(self):
        super().__init__()
        self.counts = {"passed": 0, "FAILED": 0, "skipped": 0}

    def say(self, mark, test, why=""):
        self.counts[mark] += 1
        print(f"{mark} {test.id()}{why}", flush=True)

    def addSuccess(self, test):
        self.say("passed", test)

    def addSkip(self, test, reason):
        self.say("skipped", test, f": {reason}")

    def addFailure(self, test, err):
        self.failed(test, err)

    def addError(self, test, err):
        self.failed(test, err)

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.failed(subtest, err)

    def failed(self, test, err):
        text = self._exc_info_to_string(err, test).rstrip().replace("\n", "\n    ")
        self.say("FAILED", test, f":\n    {text}")


def main():
    library = next((FOLDER / "lib").glob("libkvpool.so.0"), None)
    if library is not None:
        os.environ.setdefault("KVPOOL_LIBRARY", str(library))
    os.environ.setdefault("KVPOOL_BIN_DIR", str(FOLDER / "bin"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:0] = [str(PACKAGE), str(PACKAGE / "tests")]
    loader = unittest.TestLoader()
    if sys.argv[1:]:
        suite = loader.loadTestsFromNames(sys.argv[1:])
    else:
        suite = loader.discover(str(PACKAGE / "tests"), "test_*_gpu.py")
    result = Lines()
    suite.run(result)
    passed, failed, skipped = result.counts.values()
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0 if passed else 77


if __name__ == "__main__":
    sys.exit(main())
