"""A wheel of kvpool with the library and the daemon inside, for machines like the one that built them.

    python3 client/python/make_wheel.py BUILD OUT       BUILD: a CMake build folder; prints the wheel's path

A wheel is a zip file with its list; the standard library makes it. It is tagged for Linux and this processor, for any
Python 3: the programs in it link the system's gRPC, protobuf-c and libuv, so they run where those are installed.
"""
from __future__ import annotations

import base64
import hashlib
import pathlib
import platform
import sys
import zipfile

import tomllib

FOLDER = pathlib.Path(__file__).resolve().parent


def files_of(build: pathlib.Path) -> dict[str, tuple[pathlib.Path, int]]:
    """Each file by its name in the wheel: where it is, and its mode."""
    found = {str(path.relative_to(FOLDER)): (path, 0o644) for path in sorted((FOLDER / "kvpool").rglob("*.py"))}
    found["kvpool/py.typed"] = (FOLDER / "kvpool/py.typed", 0o644)
    found["kvpool/libkvpool.so.0"] = (build / "lib/libkvpool.so.0", 0o755)
    for name in ("kvpoold", "kvpool-exec"):
        found[f"kvpool/bin/{name}"] = (build / "bin" / name, 0o755)
    return found


def metadata(project: dict) -> str:
    """The core metadata, from pyproject.toml."""
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}",
             f"Summary: {project['description']}", f"Requires-Python: {project['requires-python']}"]
    for extra, needs in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {need}; extra == "{extra}"' for need in needs]
    lines += ["Description-Content-Type: text/markdown", "", (FOLDER / "README.md").read_text()]
    return "\n".join(lines)


def make(build: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Write the wheel into `out`."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    tag = f"py3-none-linux_{platform.machine()}"
    stem = f"{project['name']}-{project['version']}"
    wheel = f"Wheel-Version: 1.0\nGenerator: kvpool\nRoot-Is-Purelib: false\nTag: {tag}\n"
    contents = {name: (path.read_bytes(), mode) for name, (path, mode) in files_of(build).items()}
    contents[f"{stem}.dist-info/METADATA"] = (metadata(project).encode(), 0o644)
    contents[f"{stem}.dist-info/WHEEL"] = (wheel.encode(), 0o644)
    record = ""
    target = out / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        def add(name: str, data: bytes, mode: int) -> None:
            entry = zipfile.ZipInfo(name)  # without the time: the same files make the same wheel
            entry.external_attr = (0o100000 | mode) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)

        for name, (data, mode) in contents.items():
            add(name, data, mode)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        add(f"{stem}.dist-info/RECORD", f"{record}{stem}.dist-info/RECORD,,\n".encode(), 0o644)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(make(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
