"""gRPC over TCP as an operator configures it: TLS with certificates of clients, what goes wrong there, and what the log says.

Any host that reaches the port can send what it likes: the daemon says so, and serves on.
"""
import os
import pathlib
import re
import socket
import ssl
import subprocess
import tempfile
import unittest

import grpc

from daemon import Daemon
from grpc_stub import pb

CALL_S = 60
MAKE = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -out one.csr -subj /CN=one
echo subjectAltName=IP:127.0.0.1 >one.ext
openssl x509 -req -in one.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 -extfile one.ext
"""


class Tls(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="kvpool-tls-")
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        subprocess.run(["sh", "-ec", MAKE], cwd=cls.folder, check=True, capture_output=True)

    def options(self, listen="127.0.0.1:0", **other):
        files = {"cert": "cert.pem", "key": "key.pem", "ca": "ca.pem", **other}
        settings = [f"grpc.listen={listen}", *(f"grpc.tls_{key}={self.folder / name}" for key, name in files.items())]
        return [word for setting in settings for word in ("--set", setting)]

    def refused(self, text, *options):
        """It does not start, exits 1, and says why."""
        run = self.folder / "run"
        run.mkdir(exist_ok=True)
        done = subprocess.run([os.path.join(os.environ["KVPOOL_BIN_DIR"], "kvpoold"), "--backend", "host", "--runtime-dir",
                               run, *options], stderr=subprocess.PIPE, text=True)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertIn(text, done.stderr)
        self.assertEqual(list(run.iterdir()), [])

    def open_session(self, port, **files):
        texts = {key: (self.folder / name).read_bytes() for key, name in files.items()}
        with grpc.secure_channel(f"127.0.0.1:{port}", grpc.ssl_channel_credentials(**texts)) as channel:
            call = channel.unary_unary("/kvpool.v1.KvPool/OpenSession", pb.OpenSessionRequest.SerializeToString,
                                       pb.OpenSessionReply.FromString)
            return call(pb.OpenSessionRequest(), timeout=CALL_S).session

    def test_who_has_no_certificate_is_refused_and_logged_and_others_are_served_on(self):
        with Daemon(*self.options()) as daemon:
            port = int(re.search(r"gRPC over TCP: 127.0.0.1:0, port (\d+)", daemon.log_text())[1])
            whole = {"root_certificates": "ca.pem", "private_key": "key.pem", "certificate_chain": "cert.pem"}
            self.assertTrue(self.open_session(port, **whole))
            plain = socket.create_connection(("127.0.0.1", port))
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            while plain.recv(4096):
                pass
            plain.close()
            context = ssl.create_default_context(cafile=self.folder / "ca.pem")
            with (self.assertRaises(OSError), socket.create_connection(("127.0.0.1", port)) as stranger,
                  context.wrap_socket(stranger, server_hostname="127.0.0.1") as wrapped):
                wrapped.recv(1)
                raise OSError("end-of-file")
            with self.assertRaises(grpc.RpcError):
                self.open_session(port, root_certificates="ca.pem")
            self.assertTrue(self.open_session(port, **whole))
            self.assertIn("warning: grpc: ", daemon.log_text())

    def test_what_can_not_be_served_is_said_with_its_reason(self):
        self.refused(f"grpc: {self.folder}/nowhere.pem: No such file or directory", *self.options(cert="nowhere.pem"))
        self.refused("no TLS there: address or certificate", *self.options(cert="key.pem", key="cert.pem"))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            self.refused(f"grpc: {address}: Address already in use", "--set", f"grpc.listen={address}")


if __name__ == "__main__":
    unittest.main()
