"""Write a sequence's keys and values into kvpool's pages, read them back in place, share them, give them up.

Needs numpy and no GPU: kvpool starts a daemon of its own for this process. Without `backend`, the service is used.
"""
import numpy

import kvpool

spec = kvpool.PoolSpec("quickstart", pages=64, page_size=16, layers=2, kv_heads=4, head_dim=64, dtype="float16")

with kvpool.connect(backend="host") as client, client.create_pool(spec) as pool:
    k = numpy.random.default_rng(1).standard_normal((2, 40, 4, 64)).astype("float16")  # [layers, tokens, heads, dim]
    v = k + 1

    seq = pool.open("request-1")
    seq.append(k, v)  # one call for room, then the bytes are written in this process
    print(f"{len(seq)} tokens in pages {seq.pages}")

    keys, values = (plane.numpy() for plane in pool.layer(0))  # the pool's own memory, [pages, page_size, heads, dim]
    gathered = keys[seq.pages].reshape(-1, 4, 64)[: len(seq)]
    assert (gathered == k[0]).all()

    child = seq.fork("request-2", tokens=36)  # shares two full pages; the third is its own
    child.append(k[:, :1], v[:, :1])
    print(f"the child has {len(child)} tokens in pages {child.pages}")

    child.close()
    seq.close()
    print(f"{pool.free_pages} of {pool.pages} pages are free again")
