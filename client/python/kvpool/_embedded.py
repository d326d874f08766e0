"""An embedded daemon: a kvpoold of this process's own, where no service runs.

    this process ── pipe ──► /bin/sh ── child ──► kvpoold ──► kvpool-exec
                             waits for the pipe, ends kvpoold, removes the folder

The shell does what this process could not do when it is killed: the pipe's end-of-file tells it. It sits in a session
of its own, so that a Ctrl-C at the terminal does not take the daemon from under this process. One daemon a backend is
started by a process, at the first connect() that needs it; a forked child starts one of its own.
"""
from __future__ import annotations

import atexit
import ctypes
import os
import threading
from typing import TYPE_CHECKING

from . import _abi
from .errors import Disconnected

if TYPE_CHECKING:
    import subprocess

END_S = 20
SOCKET_BYTES_MAX = 90

_SCRIPT = """
/bin/sh -c 'echo "$$" >"$0/pid"; exec "$@"' "$2" "$1" --runtime-dir "$2" --backend "$3" </dev/null >"$2/log" 2>&1 &
daemon=$!
read -r _
kill -TERM "$daemon" 2>/dev/null
wait "$daemon"
PATH=/usr/bin:/bin rm -rf "$2"
"""

_lock = threading.Lock()
_running: dict[str, EmbeddedDaemon] = {}


def find_program() -> str | None:
    """kvpoold: in $KVPOOL_BIN_DIR, beside this file (a wheel carries it there), or on PATH."""
    import shutil

    places = [os.environ.get("KVPOOL_BIN_DIR"), os.path.join(os.path.dirname(__file__), "bin")]
    for place in places:
        if place and os.access(os.path.join(place, "kvpoold"), os.X_OK):
            return os.path.join(place, "kvpoold")
    return shutil.which("kvpoold")


def _make_folder() -> str:
    """A socket's path is short: a long $TMPDIR is passed over."""
    import tempfile

    folder = tempfile.mkdtemp(prefix="kvpool-")
    if len(os.fsencode(folder)) <= SOCKET_BYTES_MAX:
        return folder
    os.rmdir(folder)
    return tempfile.mkdtemp(prefix="kvpool-", dir="/tmp")


class EmbeddedDaemon:
    """A kvpoold in a temporary folder; ends when `end` is called, or this process ends."""

    def __init__(self, program: str, backend: str) -> None:
        import subprocess

        self.pid = os.getpid()
        self.folder = _make_folder()
        self.endpoint = os.path.join(self.folder, "kvpool.sock")
        try:
            self.shell: subprocess.Popen[bytes] = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "kvpool-embedded", program, self.folder, backend],
                stdin=subprocess.PIPE, start_new_session=True,
            )
        except BaseException:
            os.rmdir(self.folder)
            raise

    def ended(self) -> bool:
        """Whether the daemon has ended by itself: then it is its shell's zombie, or was, where the shell reaps it."""
        try:
            with open(os.path.join(self.folder, "pid")) as file:
                pid = int(file.read())
        except (OSError, ValueError):
            return self.shell.poll() is not None
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    def log(self) -> str:
        """What the daemon has logged."""
        try:
            with open(os.path.join(self.folder, "log"), errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def end(self) -> None:
        """Ask it to end, and wait until the folder is gone."""
        import subprocess

        assert self.shell.stdin is not None
        try:
            self.shell.stdin.write(b"\n")
            self.shell.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self.shell.wait(END_S)
        except subprocess.TimeoutExpired:
            self.shell.kill()
            self.shell.wait()


def start(backend: str) -> EmbeddedDaemon:
    """This process's daemon of a backend, started if need be. Raises Disconnected where there is no program for it."""
    with _lock:
        daemon = _running.pop(backend, None)
        if daemon is not None and daemon.pid == os.getpid():
            if not daemon.ended():
                _running[backend] = daemon
                return daemon
            daemon.end()
        program = find_program()
        if program is None:
            raise Disconnected(
                "no kvpool service runs here, and there is no kvpoold to embed: start one, set $KVPOOL_ENDPOINT, "
                "or put kvpoold on PATH or in $KVPOOL_BIN_DIR"
            )
        _running[backend] = EmbeddedDaemon(program, backend)
        return _running[backend]


def end() -> None:
    """End this process's daemons."""
    with _lock:
        for daemon in _running.values():
            if daemon.pid == os.getpid():
                daemon.end()
        _running.clear()


def _forked() -> None:
    """A thread of the parent's may have had the lock, and is not here to give it back."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


def _ends_with_process() -> bool:
    """Whether this is the main interpreter: another one may end, and the process goes on."""
    mine, main = (ctypes.PYFUNCTYPE(ctypes.c_void_p)((f"PyInterpreterState_{name}", ctypes.pythonapi))
                  for name in ("Get", "Main"))
    return bool(mine() == main())


@atexit.register
def _leave() -> None:
    if _abi.library.cache_info().currsize and _ends_with_process():
        _abi.library().kvp_owner_forever()
    end()
