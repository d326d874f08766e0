"""A paged KV cache by request id: on its own, and on a pool that a daemon owns. Needs numpy and no GPU."""
import numpy

import kvpool


def serve(cache_manager):
    rng = numpy.random.default_rng(1)
    for step in range(40):
        for request_id in range(3):
            k = rng.standard_normal((32, 128)).astype("float16")
            v = rng.standard_normal((32, 128)).astype("float16")
            cache_manager.append(request_id, k, v)
            last = cache_manager.get_page_table(request_id)[step // 16]
            assert (numpy.asarray(cache_manager.kv_cache)[last, 0, step % 16] == k).all()
    for request_id in range(3):
        print(f"request {request_id}: {cache_manager.get_seq_len(request_id)} tokens in pages "
              f"{cache_manager.get_page_table(request_id).tolist()}")
        cache_manager.free(request_id)


serve(kvpool.PagedKVCacheManager(max_num_pages=256, page_size=16, num_kv_heads=32, head_dim=128))

spec = kvpool.PoolSpec("manager", pages=256, page_size=16, kv_heads=32, head_dim=128, joined=True)
with kvpool.connect(backend="host") as client, client.create_pool(spec) as pool:
    serve(kvpool.PagedKVCacheManager(256, 16, 32, 128, pool=pool))
