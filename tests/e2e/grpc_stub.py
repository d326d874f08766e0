"""kvpool.v1 for Python's own gRPC: messages made by protoc from proto/kvpool.proto when it is imported, and a stub whose
calls are named as in the service. Nothing of kvpool's own code is in it.

    stub = Stub(path_of_grpc_sock)
    reply = stub.call("OpenSession", lease_ms=30000)        # raises Refused
"""
import importlib
import pathlib
import subprocess
import sys
import tempfile

import grpc

PROTO = pathlib.Path(__file__).resolve().parents[2] / "proto"
CALL_S = 30


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
    def __init__(self, path, target=None):
        self.channel = grpc.insecure_channel(target or f"unix:{path}",
                                             options=[("grpc.max_receive_message_length", -1)])
        service = pb.DESCRIPTOR.services_by_name["KvPool"]
        self.methods = {m.name: m for m in service.methods}
        self.calls = {}
        for name in self.methods:
            reply = getattr(pb, self.methods[name].output_type.name)
            self.calls[name] = self.channel.unary_unary(f"/kvpool.v1.KvPool/{name}",
                                                        lambda request: request.SerializeToString(), reply.FromString)

    def request(self, name, /, **fields):
        return getattr(pb, self.methods[name].input_type.name)(**fields)

    def send(self, name, request, timeout=CALL_S):
        try:
            return self.calls[name](request, timeout=timeout, wait_for_ready=True)
        except grpc.RpcError as failure:
            raise Refused(failure) from None

    def call(self, name, /, **fields):
        return self.send(name, self.request(name, **fields))

    def raw(self, path, data, timeout=CALL_S, **options):
        """Bytes in, bytes out, to any path."""
        try:
            return self.channel.unary_unary(path, is_raw, is_raw)(data, timeout=timeout, wait_for_ready=True, **options)
        except grpc.RpcError as failure:
            raise Refused(failure) from None

    def close(self):
        self.channel.close()
