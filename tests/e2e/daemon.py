"""A kvpoold of one's own: in a folder of its own, started until it says that it serves, and ended.

    with Daemon() as daemon:        # or Daemon("--set", "grpc.streams=8")
        ... daemon.grpc_socket, daemon.session_socket ...

With keeper=True it runs under kvpool-keeper, which keeps its memory and starts it again when it is killed.

The programs are taken from $KVPOOL_BIN_DIR. What happens is waited for, never slept for: the daemon's own word over
sd_notify's protocol says that it serves.
"""
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading

START_S = 60
STOP_S = 60


class Daemon:
    def __init__(self, *options, backend="host", keeper=False, environment=None):
        self.options = ["--backend", backend, *options]
        self.keeper = keeper
        self.environment = environment or {}
        self.process = None

    def __enter__(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="kvpool-test-"))
        self.runtime_dir = self.folder / "run"
        self.runtime_dir.mkdir()
        self.session_socket = self.runtime_dir / "kvpool.sock"
        self.grpc_socket = self.runtime_dir / "grpc.sock"
        self.log = self.folder / "log"
        self.notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.notices.bind(str(self.folder / "notify"))
        try:
            self.start()
        except BaseException:
            self.clear()
            raise
        return self

    def __exit__(self, kind, value, trace):
        try:
            if self.process.poll() is None:
                code = self.stop()
                if kind is None and code != 0:
                    raise AssertionError(f"kvpoold ended with {code}:\n{self.log_text()}")
        finally:
            self.clear()

    def start(self):
        programs = os.environ.get("KVPOOL_BIN_DIR")
        if not programs:
            raise SystemExit("KVPOOL_BIN_DIR is not set: the folder of kvpoold and kvpool-exec")
        command = [os.path.join(programs, "kvpoold"), "--runtime-dir", str(self.runtime_dir), *self.options]
        environment = dict(os.environ, **self.environment)
        if self.keeper:
            command = [os.path.join(programs, "kvpool-keeper"), "--", *command]
        else:
            environment["NOTIFY_SOCKET"] = str(self.folder / "notify")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        if self.keeper:  # it is the keeper that kvpoold tells; clients wait for the socket
            return
        self.await_ready()
        # It goes on telling, and waits for its fds to be closed here: read to the end.
        threading.Thread(target=self.drain, args=(self.notices.dup(),), daemon=True).start()

    def await_ready(self):
        pid_fd = os.pidfd_open(self.process.pid)
        try:
            while True:
                ready, _, _ = select.select([self.notices, pid_fd], [], [], START_S)
                if self.notices in ready:
                    if b"READY=1" in self.notices.recv(65536).split(b"\n"):
                        return
                elif pid_fd in ready:
                    raise AssertionError(f"kvpoold ended with {self.process.wait()}:\n{self.log_text()}")
                else:
                    raise AssertionError(f"kvpoold does not serve within {START_S} s:\n{self.log_text()}")
        finally:
            os.close(pid_fd)

    @staticmethod
    def drain(notices):
        with notices:
            while notices.recv(65536) != b"END":
                pass

    def stop(self):
        """SIGTERM. The exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)

    def kill(self):
        self.process.kill()
        return self.process.wait(STOP_S)

    def kill_under_keeper(self, name="kvpoold"):
        """SIGKILL to kvpoold or kvpool-exec, if it runs at the moment: it is started again."""
        for pid in self.descendants(self.process.pid):
            try:
                if pathlib.Path(f"/proc/{pid}/comm").read_text().strip() == name:
                    os.kill(pid, signal.SIGKILL)
                    return True
            except (FileNotFoundError, ProcessLookupError):
                pass
        return False

    def descendants(self, pid):
        try:
            children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return
        for child in children:
            yield int(child)
            yield from self.descendants(int(child))

    def log_text(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def clear(self):
        if self.process is not None and self.process.poll() is None:
            if self.keeper:
                self.stop()
            else:
                self.kill()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"END", str(self.folder / "notify"))
        self.notices.close()
        shutil.rmtree(self.folder)
