"""The other process of the tests of kvpool.hf.

    hf_worker.py take DEVICE ENDPOINT POOL       prints its session's id, reads [handle, tokens, how many], goes on with
                                                 that generation, prints the tokens
    hf_worker.py die DEVICE ENDPOINT POOL        reads [tokens, how many], prints its session's secret, and generates;
                                                 behind each pass it prints [handle, the new tokens]
"""
from __future__ import annotations

import json
import sys

import hf_models
import torch
from transformers.generation.streamers import BaseStreamer

import kvpool
from kvpool import hf


def say(what) -> None:
    print(json.dumps(what), flush=True)


class Tell(BaseStreamer):
    def __init__(self, cache) -> None:
        self.cache = cache

    def put(self, tokens) -> None:
        say([self.cache.handle(), tokens.flatten().tolist()])

    def end(self) -> None:
        pass


def handle_of(fields) -> hf.Handle:
    return hf.Handle(fields[0], tuple(fields[1]), fields[2])


def generate(model, tokens, cache, n: int, **more):
    ids = torch.tensor(tokens, device=model.device)
    return model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                          do_sample=False, **more)


def main() -> None:
    how, device, endpoint, name = sys.argv[1:]
    model = hf_models.make(device=device)
    client = kvpool.connect(endpoint)
    pool = client.attach(name)
    if how == "take":
        say(client.session.session_id)
        fields, tokens, n = json.loads(sys.stdin.readline())
        with hf.KVPoolCache.attach(model.config, pool, handle_of(fields)) as cache:
            say(generate(model, tokens, cache, n).tolist())
        client.close()
    else:
        tokens, n = json.loads(sys.stdin.readline())
        say(client.session.resume_secret.hex())
        cache = hf.KVPoolCache(model.config, pool, durable=True)
        generate(model, tokens, cache, n, streamer=Tell(cache))
        sys.stdin.read()  # to be killed


if __name__ == "__main__":
    main()
