"""An engine in the tests of kvpool.torch on a GPU: it makes its KV tensors in regions, and is killed.

    torch_worker.py ENDPOINT POOL TAG OPTIONS    OPTIONS, in JSON: preserve, and whether to `write` (a seed), how to
                                                 `make` the tensors, and `sizes` where they are others than ENGINE's

It prints what it found in each tensor, a digest and where it lies; writes; prints "ready", and waits to be killed. What
kvpool refuses is printed as {"error": class, "text": …}.
"""
from __future__ import annotations

import hashlib
import json
import sys

import torch

import kvpool
from kvpool import torch as kv

MIB = 1 << 20
# bytes of each tensor: 32 layers of 12 MiB, and others that torch rounds in other ways
ENGINE = [12 * MIB] * 32 + [64 * 1024, 3 * MIB, 1, 10 * MIB + 2]
DEVICE = "cuda:0"


def make(how: str, nbytes: int) -> torch.Tensor:
    n = -(-nbytes // 2)
    if how == "zeros":
        return torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    if how == "full":
        return torch.full((n,), 1.0, dtype=torch.bfloat16, device=DEVICE)
    if how == "zero_":
        return torch.empty(n, dtype=torch.bfloat16, device=DEVICE).zero_()
    return torch.empty(n, dtype=torch.bfloat16, device=DEVICE)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


def pattern(seed: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + index)
    return torch.randint(0, 256, (2 * len(tensor),), dtype=torch.uint8, generator=generator).view(torch.bfloat16)


def where(pool: kvpool.Pool, tag: str, index: int, tensor: torch.Tensor) -> bool:
    """Whether the tensor lies in the region of its number."""
    found = pool.region(f"{tag}/{index}")
    size = tensor.untyped_storage().nbytes()
    return found.pointer <= tensor.data_ptr() and tensor.data_ptr() + size <= found.pointer + found.nbytes


def run(endpoint: str, name: str, tag: str, options: dict) -> dict:
    client = kvpool.connect(endpoint, connect_ms=20000)
    pool = client.attach(name)
    tensors: list[torch.Tensor] = []
    outside = torch.ones(MIB, device=DEVICE)
    with kv.use_pool(pool, tag, options["preserve"]):
        for size in options.get("sizes", ENGINE):
            tensors.append(make(options.get("make", "zeros"), size))
    behind = torch.ones(MIB, device=DEVICE)
    found = {"digests": [digest(tensor) for tensor in tensors],
             "inside": [where(pool, tag, i, tensor) for i, tensor in enumerate(tensors)],
             "outside": [any(region.pointer <= other.data_ptr() < region.pointer + region.nbytes
                             for region in map(pool.region, (info.name for info in pool.regions())))
                         for other in (outside, behind)],
             "room": [kv.room(options.get("sizes", ENGINE)), sum(info.nbytes for info in pool.regions())]}
    if options.get("write") is not None:
        for i, tensor in enumerate(tensors):
            tensor.copy_(pattern(options["write"], i, tensor))
        torch.cuda.synchronize()
        found["written"] = [digest(tensor) for tensor in tensors]
    return found


def main() -> None:
    endpoint, name, tag, options = sys.argv[1:]
    try:
        print(json.dumps(run(endpoint, name, tag, json.loads(options))), flush=True)
    except kvpool.KvpoolError as error:
        print(json.dumps({"error": type(error).__name__, "text": error.text,
                          "cause": type(error.__cause__).__name__}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
