"""What a prefix cache of so many blocks must hit on a request trace: Leaf-LRU, Infinite, and the bound MIN-pin.

Plain and slow, written from the definitions alone:

    order      by timestamp, stably; each request is looked up and inserted completely before the next
    lookup     h = how many leading ids are cached when the request starts; blocks behind a gap are no hits
    insertion  of the first min(n, C) blocks, which are pinned meanwhile; an output is not inserted
    Leaf-LRU   a block's stamp is the index of the last request that held it; a block may go only when no cached block
               has it as its parent (the id before it); the one with the smallest stamp goes
    Infinite   nothing goes
    MIN-pin    of all that is there behind the insertion, what is needed again last goes first: by the largest (next
               request that holds it, place in the request, id); the first min(n, C) of the request at hand stay
"""
import heapq
import json
import math

NEVER = math.inf


class Trace:
    """Requests in the order in which they are served."""

    def __init__(self, requests):
        requests = sorted(requests, key=lambda request: request["timestamp"])
        self.requests = [request["hash_ids"] for request in requests]
        self.lengths = [request["input_length"] for request in requests]
        self.blocks = sum(map(len, self.requests))
        self.unique = len({block for request in self.requests for block in request})

    @classmethod
    def read(cls, path):
        with open(path) as lines:
            return cls([json.loads(line) for line in lines if line.strip()])

    def block_tokens(self):
        """The size by which every request's blocks are its whole ones, or those and a partial one; None: none is."""
        for tokens in (512, 64, 16, 32, 128, 256, 1024, 2048, 4096):
            if all(len(ids) in (length // tokens, -(-length // tokens))
                   for ids, length in zip(self.requests, self.lengths)):
                return tokens
        return None


class Result:
    def __init__(self, trace, hits):
        tokens = trace.block_tokens()
        self.per_request = hits
        self.hits = sum(hits)
        self.block_rate = self.hits / trace.blocks if trace.blocks else 0
        self.token_rate = None if tokens is None else (
            sum(min(h * tokens, length) for h, length in zip(hits, trace.lengths)) / sum(trace.lengths))


def leading(cached, ids):
    h = 0
    while h < len(ids) and ids[h] in cached:
        h += 1
    return h


def infinite(trace):
    cached, hits = set(), []
    for ids in trace.requests:
        hits.append(leading(cached, ids))
        cached.update(ids)
    return Result(trace, hits)


def leaf_lru(trace, capacity):
    stamps, children, parents = {}, {}, {}  # of cached blocks
    leaves = []                             # (stamp, block): those that could go, and some that can not any more
    hits, evictions = [], 0
    for index, ids in enumerate(trace.requests):
        hits.append(leading(stamps, ids))
        kept = ids[:capacity]
        pinned = set(kept)
        room = len(stamps) + sum(block not in stamps for block in kept) - capacity
        while room > 0:
            stamp, block = heapq.heappop(leaves)
            if stamps.get(block) != stamp or children[block] or block in pinned:
                continue
            parent = parents[block]
            del stamps[block], children[block], parents[block]
            evictions += 1
            room -= 1
            if parent is not None:
                children[parent] -= 1
                if not children[parent]:
                    heapq.heappush(leaves, (stamps[parent], parent))
        parent = None
        for block in kept:
            if block not in stamps:
                children[block] = 0
                parents[block] = parent
                if parent is not None:
                    children[parent] += 1
            stamps[block] = index
            parent = block
        for block in kept:
            if not children[block]:
                heapq.heappush(leaves, (index, block))
    result = Result(trace, hits)
    result.evictions = evictions
    return result


def min_pin(trace, capacity):
    following, next_of = [], {}  # of each request, the next request that holds each block
    for index in range(len(trace.requests) - 1, -1, -1):
        ids = trace.requests[index]
        following.append([next_of.get(block, NEVER) for block in ids])
        next_of.update(dict.fromkeys(ids, index))
    following.reverse()
    cached, order, hits = {}, [], []  # order: the worst first, with some that are out of date
    for ids, nexts in zip(trace.requests, following):
        hits.append(leading(cached, ids))
        for place, (block, need) in enumerate(zip(ids, nexts)):
            cached[block] = (-need, -place, -block)
            heapq.heappush(order, (cached[block], block))
        pinned, aside = set(ids[:capacity]), []
        while len(cached) > capacity:
            rank, block = heapq.heappop(order)
            if cached.get(block) != rank:
                continue
            if block in pinned:
                aside.append((rank, block))
            else:
                del cached[block]
        for entry in aside:
            heapq.heappush(order, entry)
    return Result(trace, hits)
