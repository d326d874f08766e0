"""Connecting to kvpool: `connect`, `Client`, and who owns what is mapped."""
from __future__ import annotations

import ctypes
import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from . import _abi, _embedded
from ._arguments import U64, integer, text
from .errors import Busy, Disconnected, InvalidArgument, KvpoolError, SessionEnded, Status, check, fail
from .spec import PoolInfo, PoolSpec, info_from_c, to_c

if TYPE_CHECKING:
    from .pool import Pool

ENDPOINT_DEFAULT = "/run/kvpool/kvpool.sock"
EMBEDDED_START_S = 30.0
_EMBEDDED_TRY_MS = 100
_CLAIM_TRY_S = 0.005


class Owner(ctypes.c_void_p):
    """A reference of ours on a kvp_owner, given up with this object; and what it is of, as calls take it: a kvp_client
    or a kvp_pool.

    A call has this object until it returns. So what one thread closes ends when no other is in a call of it any more.
    NULL once it is given up: of a cycle, the garbage collector may finalize it before others, who still make calls.
    Nobody keeps it in a variable where an error is raised: its traceback would keep the pool attached.
    """

    pointer: int | None = None  # Ctrl-C may come into __init__, and then __del__

    def __init__(self, kept: int | None, pointer: int | None) -> None:
        super().__init__(kept)
        self.pointer = pointer

    def share(self) -> Owner:
        """A reference of its own on the same, for who may outlive this one."""
        _abi.library().kvp_owner_retain(self.pointer)
        return Owner(self.value, self.pointer)

    def __del__(self) -> None:
        self.value = None
        _abi.library().kvp_owner_release(self.pointer)

    def __reduce__(self) -> NoReturn:
        """A copy would give up a reference that it has not, and in another process it is no address."""
        raise TypeError("what is connected or mapped in a process can be neither copied nor pickled: another process "
                        "connects, and attaches the pool by its name")


class SessionInfo(NamedTuple):
    """The session that a client's calls belong to."""

    session_id: int
    """Public: names the session in `Sequence.transfer`."""
    epoch: int
    """Counts the daemon's starts on its ledger."""
    instance: bytes
    """uuid of the ledger."""
    resume_secret: bytes
    """Claims durable sequences after the session's death."""


def _connect(endpoint: str, connect_ms: int, reconnect_ms: int, session: str | None) -> int:
    path = os.fsencode(endpoint)
    if b"\0" in path:
        raise InvalidArgument(f"endpoint {endpoint!r} has a zero byte")
    options = _abi.ConnectOptions(connect_ms=integer("connect_ms", connect_ms),
                                  reconnect_ms=integer("reconnect_ms", reconnect_ms),
                                  session=text("session", session) if session else None)
    client = ctypes.c_void_p()
    check(_abi.library().kvp_connect(path, ctypes.byref(options), ctypes.byref(client)))
    assert client.value is not None
    return client.value


def _connect_embedded(backend: str, reconnect_ms: int) -> tuple[int, str]:
    if backend not in ("auto", "host", "cuda"):
        raise InvalidArgument(f"backend {backend!r} is none of auto, host, cuda")
    _abi.library()  # without it, there is nobody to start a daemon for
    daemon = _embedded.start(backend)
    deadline = time.monotonic() + EMBEDDED_START_S
    while True:
        try:
            return _connect(daemon.endpoint, _EMBEDDED_TRY_MS, reconnect_ms, None), daemon.endpoint
        except Disconnected as error:
            if time.monotonic() < deadline and not daemon.ended():
                continue
            told = [line.partition(" error: ")[2] for line in daemon.log().splitlines() if " error: " in line]
            raise Disconnected(f"the embedded kvpoold does not serve: {'; '.join(told) or error}") from None


def connect(endpoint: str | os.PathLike[str] | None = None, *, backend: str | None = None, connect_ms: int = 0,
            reconnect_ms: int = 0, session: str | None = None) -> Client:
    """Connect to the daemon, in a session of this process's own.

    `endpoint`: the session socket's path; None: $KVPOOL_ENDPOINT, else the running service's socket, else an embedded
    daemon for this process, which ends with it. `backend`: an embedded daemon whatever service runs, with its pools in
    host memory ("host"), in GPU memory ("cuda"), or in the latter where there is a GPU ("auto"). `connect_ms`: try for
    so long (0: once). `reconnect_ms`: try a lost connection again for so long (0: 5 s). `session`: the token of a
    session by lease to be.

    Raises Disconnected where nobody listens, NotPermitted where the socket is not ours to use, SessionEnded where the
    token's session is unknown.
    """
    if endpoint is not None and backend is not None:
        raise InvalidArgument(f"backend {backend!r} is of an embedded daemon, not of the one at {endpoint!r}")
    if endpoint is None and backend is None:
        endpoint = os.environ.get("KVPOOL_ENDPOINT") or None
    if endpoint is not None:
        path = os.fspath(endpoint)
        return Client(_connect(path, connect_ms, reconnect_ms, session), path, embedded=False)
    if backend is None and (session is not None or os.path.exists(ENDPOINT_DEFAULT)):
        try:
            return Client(_connect(ENDPOINT_DEFAULT, connect_ms, reconnect_ms, session), ENDPOINT_DEFAULT,
                          embedded=False)
        except Disconnected:
            if session is not None:
                raise
    pointer, path = _connect_embedded(backend or "auto", reconnect_ms)
    return Client(pointer, path, embedded=True)


class Client:
    """A connection to the daemon and its session. Made by `connect`; threads may share it, forked children may not.

    A context manager: closed at the end of its block.
    """

    def __init__(self, pointer: int, endpoint: str, *, embedded: bool) -> None:
        owner = ctypes.c_void_p()
        check(_abi.library().kvp_owner_of_client(pointer, ctypes.byref(owner)))
        assert owner.value is not None
        self._owner: Owner | None = Owner(pointer, owner.value)
        self._pools: list[Pool] = []
        self._session: SessionInfo | None = None
        self.endpoint = endpoint
        """The session socket."""
        self.embedded = embedded
        """Whether the daemon is this process's own."""

    def __repr__(self) -> str:
        return f"<kvpool.Client {self.endpoint}{'' if self._owner else ', closed'}>"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    @property
    def pointer(self) -> Owner:
        """The kvp_client, for calls of libkvpool that this package does not wrap. Raises SessionEnded when closed."""
        owner = self._owner
        if not owner:
            raise SessionEnded("the client is closed")
        return owner

    def close(self) -> None:
        """Detach every pool, closing the sequences that were opened in it here, and disconnect.

        Tensors that were made of a pool stay valid, and keep the connection until they are gone. So does a call that
        is under way on another thread; the next one there raises SessionEnded.
        """
        if self._owner is None:
            return
        for pool in list(self._pools):
            try:
                pool.detach()
            except KvpoolError:
                pool.abandon()
        self._owner = None

    @property
    def session(self) -> SessionInfo:
        """The session that this client's calls belong to: one call, the first time."""
        if self._session is None:
            info = _abi.SessionInfo()
            check(_abi.library().kvp_session_info(self.pointer, ctypes.byref(info)))
            secret = bytes(info.resume_secret)[: info.resume_secret_bytes]
            self._session = SessionInfo(info.session_id, info.epoch, bytes(info.instance), secret)
        return self._session

    def create_pool(self, spec: PoolSpec) -> Pool:
        """Make a pool, or find the one of that name and the same spec, and attach it.

        Raises InvalidArgument where the spec is out of a limit, AlreadyExists where there is another of that name,
        OutOfMemory, NoDevice or DeviceError where its memory is not to be had.
        """
        if not isinstance(spec, PoolSpec):
            raise TypeError(f"the spec is a {type(spec).__name__}; it must be a PoolSpec")
        made, _kept = to_c(spec)
        check(_abi.library().kvp_pool_create(self.pointer, ctypes.byref(made), None))
        return self.attach(spec.name)

    def attach(self, name: str, *, model: str | None = None, layout_digest: tuple[int, int] | None = None,
               join: int = 0, metadata_only: bool = False) -> Pool:
        """Map a pool into this process; one that is attached here already is that Pool again.

        `model`, `layout_digest`: what they must be. `join`: session id of the owner whose group this rank joins.
        `metadata_only`: map no page; sequences may be listed, transferred and closed.
        Raises NotFound, LayoutMismatch, LimitReached, PoolLost, NoDevice; Busy where it is attached here, and `join` or
        `metadata_only` is asked for.
        """
        from .pool import Pool

        encoded = text("name", name)
        options = _abi.AttachOptions(model=text("model", model) if model is not None else None,
                                     join=integer("join", join, U64), metadata_only=metadata_only)
        if layout_digest is not None:
            high, low = layout_digest
            options.layout_digest = (ctypes.c_uint64 * 2)(integer("layout_digest", high, U64),
                                                          integer("layout_digest", low, U64))
        known = self._attached(name)
        if known is not None and (join or metadata_only):
            raise Busy(f"pool {name} is attached by this client already")
        if known is not None and model in (None, known.info.spec.model) and layout_digest in (
                None, known.info.layout_digest):
            return known
        pointer = ctypes.c_void_p()
        status = _abi.library().kvp_attach(self.pointer, encoded, ctypes.byref(options), ctypes.byref(pointer))
        if status != 0:
            fail(status, layout=True)
        assert pointer.value is not None
        pool = Pool(self, self.pointer, pointer.value)
        self._pools.append(pool)
        return pool

    def claim(self, resume_secret: bytes, *, wait_ms: int = 60_000) -> None:
        """Take over the durable sequences of a dead session, by its `session.resume_secret`: those in pools that are
        attached here; `Pool.open` with their keys finds them. Those in other pools are given up.

        Waits up to `wait_ms` for the proof that the dead process is gone, its GPU work too. Raises Busy where that does
        not come, NotFound where no dead session of that secret is remembered, NotPermitted where it was another user's,
        AlreadyExists where a key is open here.
        """
        if not isinstance(resume_secret, bytes):
            raise TypeError(f"resume_secret is a {type(resume_secret).__name__}; it must be bytes")
        if not resume_secret:
            raise InvalidArgument("resume_secret is empty; without one, there is no session to claim")
        info = _abi.SessionInfo()
        deadline = time.monotonic() + wait_ms / 1000
        while True:
            status = _abi.library().kvp_session_open(self.pointer, 0, b"claim", resume_secret, len(resume_secret),
                                                     ctypes.byref(info))
            if status != Status.EBUSY or time.monotonic() >= deadline:
                break
            time.sleep(_CLAIM_TRY_S)
        check(status)
        token = info.token.decode()
        try:
            with Client(_connect(self.endpoint, 0, 0, token), self.endpoint, embedded=False) as claimed:
                for pool in list(self._pools):
                    claimed.attach(pool.name, metadata_only=True).transfer_all(self.session.session_id)
        finally:
            check(_abi.library().kvp_session_close(self.pointer, token.encode()))

    def _attached(self, name: str) -> Pool | None:
        for pool in self._pools:
            if pool.name == name and pool.alive:
                return pool
        return None

    def _forget(self, pool: Pool) -> None:
        if pool in self._pools:
            self._pools.remove(pool)

    def pools(self) -> list[str]:
        """The names of all pools."""
        names = ctypes.POINTER(ctypes.c_char_p)()
        n = ctypes.c_size_t()
        check(_abi.library().kvp_pool_list(self.pointer, ctypes.byref(names), ctypes.byref(n)))
        found = [(name or b"").decode() for name in names[: n.value]]
        _abi.libc().free(ctypes.cast(names, ctypes.c_void_p))
        return found

    def describe(self, name: str) -> PoolInfo:
        """A pool as it is now. Raises NotFound."""
        info = ctypes.POINTER(_abi.PoolInfo)()
        check(_abi.library().kvp_pool_describe(self.pointer, text("name", name), ctypes.byref(info)))
        try:
            return info_from_c(info.contents)
        finally:
            _abi.library().kvp_pool_info_free(ctypes.cast(info, ctypes.c_void_p))

    def delete_pool(self, name: str) -> None:
        """Raises NotFound; Busy while sessions have it attached, its pages retire, or it has regions."""
        check(_abi.library().kvp_pool_delete(self.pointer, text("name", name)))

    def audit(self) -> list[str]:
        """Walk the ledger: a sentence for each violation of its invariants, at least for the first of them. [] is
        clean."""
        count = ctypes.c_uint32()
        texts = ctypes.POINTER(ctypes.c_char_p)()
        n = ctypes.c_size_t()
        check(_abi.library().kvp_audit(self.pointer, ctypes.byref(count), ctypes.byref(texts), ctypes.byref(n)))
        found = [(text or b"").decode(errors="replace") for text in texts[: n.value]]
        _abi.libc().free(ctypes.cast(texts, ctypes.c_void_p))
        return found + ["a violation without a text"] * (count.value - len(found))
