"""kvpool.v1 for Python's own gRPC: messages made by protoc from proto/kvpool.proto when it is imported, and a stub whose
calls are named as in the service. Nothing of kvpool's own code is in it.

    stub = Stub(path_of_grpc_sock)
    reply = stub.call("OpenSession", lease_ms=30000)        # raises Refused

A stub with again=True makes a call again, the same request with the same call id, when the connection breaks under it or
the daemon is not served yet.
"""
import importlib
import pathlib
import subprocess
import sys
import tempfile
import time

import grpc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
CALL_S = 60


def make_messages():
    with tempfile.TemporaryDirectory(prefix="kvpool-proto-") as folder:
        subprocess.run(["protoc", f"--python_out={folder}", f"-I{PROTO}", "kvpool.proto"], check=True)
        sys.path.insert(0, folder)
        sys.dont_write_bytecode = True
        try:
            return importlib.import_module("kvpool_pb2")
        finally:
            sys.path.remove(folder)


pb = make_messages()


class Refused(Exception):
    """A call that failed: gRPC's code and text, and the Error of the trailing metadata."""

    def __init__(self, failure):
        self.code = failure.code().name
        self.text = failure.details()
        self.error = None
        for key, value in failure.trailing_metadata() or ():
            if key == "kvp-status-bin":
                self.error = pb.Error.FromString(value)
        self.status = self.text.split(":", 1)[0] if self.text.startswith("KVP_") else ""
        super().__init__(f"{self.code} {self.text}")


def is_raw(value):
    return value


class Stub:
    def __init__(self, path, again=False):
        self.again, self.repeated = again, 0
        self.channel = grpc.insecure_channel(f"unix:{path}", options=[
            ("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 20), ("grpc.min_reconnect_backoff_ms", 20),
            ("grpc.max_reconnect_backoff_ms", 100)])
        service = pb.DESCRIPTOR.services_by_name["KvPool"]
        self.methods = {m.name: m for m in service.methods}
        self.calls = {}
        for name in self.methods:
            reply = getattr(pb, self.methods[name].output_type.name)
            self.calls[name] = self.channel.unary_unary(f"/kvpool.v1.KvPool/{name}",
                                                        lambda request: request.SerializeToString(), reply.FromString)

    def request(self, name, /, **fields):
        return getattr(pb, self.methods[name].input_type.name)(**fields)

    def until_answered(self, call, timeout):
        limit = time.monotonic() + timeout
        while True:
            try:
                return call()
            except grpc.RpcError as failure:
                refused = Refused(failure)
                broken = refused.error is None and refused.code in ("UNAVAILABLE", "UNKNOWN", "CANCELLED")
                if not self.again or not (broken or refused.status == "KVP_EAGAIN") or time.monotonic() > limit:
                    raise refused from None
                self.repeated += 1

    def send(self, name, request, timeout=CALL_S):
        return self.until_answered(lambda: self.calls[name](request, timeout=timeout, wait_for_ready=True), timeout)

    def call(self, name, /, **fields):
        return self.send(name, self.request(name, **fields))

    def raw(self, path, data, timeout=CALL_S):
        """Bytes in, bytes out, to any path."""
        call = self.channel.unary_unary(path, is_raw, is_raw)
        return self.until_answered(lambda: call(data, timeout=timeout, wait_for_ready=True), timeout)

    def close(self):
        self.channel.close()
