#!/usr/bin/python3
"""A foreign gRPC client against a real daemon, beside a naive model: random calls, right and wrong ones, and after each
one the lengths, page tables and indices must be the model's.

    grpc_model.py [--calls N] [--seed S] [--kills N]

The client is Python's grpcio, with messages made from proto/ by protoc. Random calls come from a seed, which is
printed: 1 if none is given, and any in long runs ($KVPOOL_TEST_LONG). In mid-run another gRPC client is killed while it
appends: its lease lapses, and nothing of it stays. Every hundred calls `Audit` is clean and each pool has the free pages
that the model has.

With --kills it is the daemon that is killed, so many times, under calls, or its executor; kvpool-keeper starts the daemon
again, the client makes the broken call once more with the same call id, and all must be as if nothing had happened.

grpc_right.py, grpc_wrong.py and grpc_wrong_cache.py have the calls, grpc_world.py what is compared, naive_pool.py and
naive_cache.py the model.
"""
import argparse
import collections
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time

sys.dont_write_bytecode = True

from daemon import Daemon
from grpc_right import WEIGHTS, Right
from grpc_stub import Refused, Stub, pb
from grpc_world import Failure, World
from grpc_wrong import Wrong

WRONG = 0.15  # of the calls
VICTIM_SEQS, VICTIM_TOKENS = 32, 3
VICTIM_LEASE_MS = 8000  # it lapses in the second half of the run, and not before the kill


def be_victim(path):
    """Append until killed; say which session it is once it has begun."""
    stub = Stub(path)
    session = stub.call("OpenSession", lease_ms=VICTIM_LEASE_MS, name="victim")
    planes = [pb.Plane(layer=0, component=c, heads=2, dim=8, dtype=pb.DTYPE_F16) for c in (pb.COMPONENT_K,
                                                                                          pb.COMPONENT_V)]
    common = dict(session=session.session, pool="victim")
    stub.call("CreatePool", session=session.session,
              spec=pb.PoolSpec(name="victim", pages=4096, page_tokens=4, planes=planes, max_sequences=64))
    common["seqs"] = stub.call("OpenSequences", keys=range(1, VICTIM_SEQS + 1), **common).seqs
    at, inline = 0, bytes(VICTIM_SEQS * VICTIM_TOKENS * 2 * 2 * 8 * 2)
    while True:
        stub.call("Append", at=[at] * VICTIM_SEQS, tokens=[VICTIM_TOKENS] * VICTIM_SEQS, inline=inline, **common)
        at += VICTIM_TOKENS
        if at == 20 * VICTIM_TOKENS:
            print(session.session_id, flush=True)
        if at == 100 * VICTIM_TOKENS:
            stub.call("Advance", reserved=[0] * VICTIM_SEQS, truncate=True, **common)
            at = 0


class Victim:
    def __init__(self, path):
        self.process = subprocess.Popen([sys.executable, __file__, "--victim", path], stdout=subprocess.PIPE)

    def kill(self):
        if self.process.returncode is not None:
            return
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if ready else b""
        self.end()
        if not line:
            raise Failure("the client that is to be killed does not begin")
        self.session = int(line)

    def end(self):
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process.stdout.close()

    def nothing_stays(self, world):
        """Its lease lapses, its pages come back."""
        limit = time.monotonic() + 60
        while True:
            stats = world.stub.call("GetStats")
            pool = next(pool for pool in stats.pools if pool.spec.name == "victim")
            if self.session not in [s.session_id for s in stats.sessions] and pool.free_pages == pool.spec.pages:
                break
            if time.monotonic() > limit:
                raise Failure(f"of the killed client there stay: {stats.sessions} {pool}")
            time.sleep(0.02)
        world.audit()
        world.stub.call("DeletePool", session=world.sessions[0].token, pool="victim")


class Killer:
    """Kills the daemon, and now and then the executor, while calls are under way."""

    def __init__(self, world, daemon, calls, kills):
        self.daemon, self.random, self.killed = daemon, world.random, collections.Counter()
        self.at = sorted(self.random.sample(range(calls // 20, calls), kills), reverse=True)
        self.timer = None

    def look(self, made):
        if self.at and made >= self.at[-1]:
            self.at.pop()
            name = self.random.choice(("kvpoold", "kvpoold", "kvpool-exec"))
            self.timer = threading.Timer(self.random.uniform(0, 0.004), self.kill, [name])
            self.timer.start()

    def kill(self, name):
        self.killed[name] += self.daemon.kill_under_keeper(name)

    def end(self):
        if self.timer is not None:
            self.timer.join()


def run_and_kill_a_client(world, calls, path):
    victim = Victim(path)
    try:
        kinds = run(world, calls, lambda made: made > calls // 2 and victim.kill())
        victim.kill()
        victim.nothing_stays(world)
    finally:
        victim.end()
    return kinds


def run_and_kill_the_daemon(world, calls, daemon, kills):
    killer = Killer(world, daemon, calls, kills)
    try:
        kinds = run(world, calls, killer.look)
    finally:
        killer.end()
    killed = ", ".join(f"{name} {n} times" for name, n in sorted(killer.killed.items()))
    print(f"killed: {killed}; {world.stub.repeated} calls were made again")
    world.hold(killer.killed["kvpoold"] > 0, "the daemon was never killed")
    return kinds


def run(world, calls, after_each):
    right, wrong = Right(world), Wrong(world)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    while world.made < calls:
        before = world.made
        if world.random.random() < WRONG:
            wrong.one()
        else:
            getattr(right, world.random.choices(names, weights)[0])()
        if before // 100 != world.made // 100:
            world.audit()
        after_each(world.made)
    return wrong.kinds


def test(calls, seed, kills):
    """How many calls were as foreseen, and how many were not."""
    begun, failed = time.monotonic(), 0
    with Daemon(keeper=kills > 0) as daemon:
        world = World(str(daemon.grpc_socket), seed, restarts=kills > 0)
        try:
            world.begin()
            if kills > 0:
                kinds = run_and_kill_the_daemon(world, calls, daemon, kills)
            else:
                kinds = run_and_kill_a_client(world, calls, str(daemon.grpc_socket))
            world.end()
            print(", ".join(f"{name} {n}" for name, n in sorted(world.by_name.items())))
            print(f"{sum(kinds.values())} wrong calls of {len(kinds)} kinds, {world.refused} refusals foreseen, "
                  f"{world.repeats} calls repeated, {world.audits} audits, {world.found()}; "
                  f"{time.monotonic() - begun:.1f} s")
        except (Failure, Refused, AssertionError) as failure:
            failed = 1
            print(f"call {world.made} of seed {seed}: {type(failure).__name__}: {failure}\nthe call: {world.last[:2000]}")
            print(daemon.log_text()[-4000:])
        world.stub.close()
    return world.made - failed, failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--victim", metavar="SOCKET", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.victim:
        return be_victim(arguments.victim)
    seed = arguments.seed
    if seed is None:
        seed = random.SystemRandom().randrange(1 << 32) if os.environ.get("KVPOOL_TEST_LONG") else 1
    print(f"seed {seed}", flush=True)
    passed, failed = test(arguments.calls, seed, arguments.kills)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
