"""A wheel of kvpool with the library, the daemon and the shared libraries that they need inside.

    python3 client/python/make_wheel.py BUILD OUT       BUILD: a CMake build folder; prints the wheel's path

    kvpool/libkvpool.so.0    finds its libraries in kvpool/libs by $ORIGIN
    kvpool/bin/              kvpoold and kvpool-exec, which do the same
    kvpool/libs/             every shared library that any of them needs, but those of the C library

The tag says manylinux and the newest glibc that any of it asks for: pip installs it where that glibc or a newer one is,
on this processor, for any Python 3, and nothing else has to be there. Needs patchelf and binutils.
"""
from __future__ import annotations

import base64
import hashlib
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit(f"make_wheel.py needs Python 3.11, this is {platform.python_version()} (the wheel is for 3.10, too)")

FOLDER = pathlib.Path(__file__).resolve().parent
SYSTEM = re.compile(r"(ld-linux.*|linux-vdso|libc|libm|libdl|libpthread|librt|libresolv|libutil|libanl)\.so.*")


def output_of(*command: object) -> str:
    """What a command prints; ends the program with what it says where it fails."""
    try:
        return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        sys.exit(f"{command[0]} is needed: apt-get install patchelf binutils")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(error.cmd)}: {error.stderr.strip()}")


def needed(file: pathlib.Path) -> dict[str, str]:
    """Where each shared library that a program needs is found, those of the C library left out."""
    lines = [line.split() for line in output_of("ldd", file).splitlines() if "=>" in line]
    return {line[0]: line[2] for line in lines if not SYSTEM.fullmatch(line[0])}


def stage(build: pathlib.Path, root: pathlib.Path) -> None:
    """The package as it is to be installed, in root/kvpool."""
    shutil.copytree(FOLDER / "kvpool", root / "kvpool", ignore=shutil.ignore_patterns("__pycache__"))
    libs, own = root / "kvpool/libs", {}
    for name, source in (("libkvpool.so.0", build / "lib/libkvpool.so.0"), ("bin/kvpoold", build / "bin/kvpoold"),
                         ("bin/kvpool-exec", build / "bin/kvpool-exec")):
        own[root / "kvpool" / name] = source
    libs.mkdir()
    (root / "kvpool/bin").mkdir()
    for target, source in own.items():
        shutil.copyfile(source, target)
        target.chmod(0o755)
        for name, place in needed(source).items():
            if place == "not":
                sys.exit(f"{name}, which {source} needs, is not here")
            shutil.copyfile(place, libs / name)
    for file in [*own, *libs.iterdir()]:
        up = {"kvpool": "/libs", "bin": "/../libs", "libs": ""}[file.parent.name]
        output_of("strip", "--strip-unneeded", file)
        output_of("patchelf", "--set-rpath", f"$ORIGIN{up}", file)
    for file in [*own, *libs.iterdir()]:
        for name, place in needed(file).items():
            if pathlib.Path(place).resolve().parent != libs.resolve():
                sys.exit(f"{file.name} finds {name} outside of the wheel, in {place}")


def glibc_of(root: pathlib.Path) -> tuple[int, int]:
    """The newest version of glibc that a file asks for."""
    versions = {(2, 17)}
    for file in [*root.rglob("*.so*"), *(root / "kvpool/bin").iterdir()]:
        found = re.findall(r"GLIBC_(\d+)\.(\d+)", output_of("objdump", "-T", file))
        versions |= {(int(major), int(minor)) for major, minor in found}
    return max(versions)


def metadata(project: dict) -> str:
    """The core metadata, from pyproject.toml."""
    lines = ["Metadata-Version: 2.1", f"Name: {project['name']}", f"Version: {project['version']}",
             f"Summary: {project['description']}", f"Requires-Python: {project['requires-python']}"]
    for extra, needs in project["optional-dependencies"].items():
        lines.append(f"Provides-Extra: {extra}")
        lines += [f'Requires-Dist: {need}; extra == "{extra}"' for need in needs]
    lines += ["Description-Content-Type: text/markdown", "", (FOLDER / "README.md").read_text()]
    return "\n".join(lines)


def write(target: pathlib.Path, contents: dict[str, tuple[bytes, int]], info: str) -> None:
    """The zip file, and the list of what is in it."""
    record = ""
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
        add(f"{info}/RECORD", f"{record}{info}/RECORD,,\n".encode(), 0o644)


def make(build: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """Write the wheel into `out`."""
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        stage(build, root)
        major, minor = glibc_of(root)
        contents = {str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mode & 0o755)
                    for path in sorted(root.rglob("*")) if path.is_file()}
    tag = f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"
    stem = f"{project['name']}-{project['version']}"
    info, wheel = f"{stem}.dist-info", f"Wheel-Version: 1.0\nGenerator: kvpool\nRoot-Is-Purelib: false\nTag: {tag}\n"
    contents[f"{info}/METADATA"] = (metadata(project).encode(), 0o644)
    contents[f"{info}/WHEEL"] = (wheel.encode(), 0o644)
    contents[f"{info}/licenses/LICENSE"] = ((FOLDER.parents[1] / "LICENSE").read_bytes(), 0o644)
    target = out / f"{stem}-{tag}.whl"
    write(target, contents, info)
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(make(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
