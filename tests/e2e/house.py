#!/usr/bin/env python3
"""The house rules that a compiler does not check, each a test of its own.

usage: house.py SOURCE_DIR BIN_DIR
"""
import os
import pathlib
import re
import subprocess
import sys
import unittest

SOURCE, BIN = (pathlib.Path(a).resolve() for a in sys.argv[1:3])

# What a room may include of ours, beside itself.
MAY_INCLUDE = {
    "proto": set(),
    "allocator": {"proto"},
    "kernels": {"proto"},
    "server": {"allocator", "kernels", "proto"},
    "client": {"kernels", "proto"},
}
# A client that is its own server: linked so that none of the server's names are seen outside it.
EMBEDS = {"client/cli/replay_embedded.c": {"allocator", "server"}}
# allocator and kernels see of proto only its plain headers.
PLAIN = {"kvp_status.h", "kvp_limits.h", "kvp_abi.h"}
TOP = {"CMakeLists.txt", "CMakePresets.json", "LICENSE", "README.md", ".clang-format", ".clang-tidy", ".gitignore",
       ".ci", "proto", "server", "kernels", "allocator", "client", "tests", "deploy"}
CODE = {".c", ".h", ".cu", ".cuh"}


def sources(room):
    return (p for p in (SOURCE / room).rglob("*") if p.suffix in CODE and "build" not in p.parts)


def headers():
    """The room of each of our headers, by file name."""
    return {p.name: room for room in MAY_INCLUDE for p in sources(room) if p.suffix in {".h", ".cuh"}}


def tool(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class House(unittest.TestCase):
    def test_includes_point_one_way(self):
        room_of = headers()
        for room, allowed in MAY_INCLUDE.items():
            for path in sources(room):
                embedded = EMBEDS.get(str(path.relative_to(SOURCE)), set())
                for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.M):
                    if (path.parent / name).exists():
                        continue
                    base = name.rsplit("/", 1)[-1]
                    owner = "proto" if base == "kvpool.pb-c.h" else room_of.get(base)
                    if owner is None or owner == room:
                        continue
                    self.assertIn(owner, allowed | embedded, f"{path} includes {name}")
                    if room in {"allocator", "kernels"}:
                        self.assertIn(base, PLAIN, f"{path} includes {name}: only proto's plain headers")

    def test_the_top_level_is_the_one_that_was_drawn(self):
        tracked = subprocess.run(["git", "-C", SOURCE, "ls-tree", "--name-only", "HEAD"], capture_output=True, text=True)
        if tracked.returncode != 0:
            self.skipTest("not a git checkout")
        self.assertEqual(set(tracked.stdout.split()) - TOP, set())

    def test_the_client_in_the_readme_is_the_one_that_is_built(self):
        self.assertIn((SOURCE / "tests/e2e/example.c").read_text(), (SOURCE / "README.md").read_text())

    def test_no_program_links_the_driver(self):
        for path in BIN.iterdir():
            if path.is_file() and os.access(path, os.X_OK):
                needed = re.findall(r"NEEDED.*\[(.*)\]", tool("readelf", "-d", path))
                self.assertFalse([n for n in needed if re.match(r"libcuda\.|libcudart|libnvidia", n)], path.name)

    def test_the_daemon_holds_no_kernel(self):
        symbols = tool("nm", BIN / "kvpoold")
        self.assertFalse(re.findall(r"\b(?:kvp_cuda_\w+|kvp_host_\w+|cuda[A-Z]\w+|cu[A-Z]\w+|nvml\w+)", symbols))

    def test_the_client_library_links_no_grpc(self):
        for path in BIN.parent.rglob("libkvpool.so*"):
            self.assertNotIn("grpc", tool("readelf", "-d", path))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[3:], verbosity=2)
