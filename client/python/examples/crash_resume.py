"""A worker is killed in the middle of a generation, and another goes on where it was, with nothing computed again.

Needs torch and transformers; runs on a GPU where there is one.
"""
import multiprocessing

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import kvpool
from kvpool import hf

TOKENS = 60
device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                     num_attention_heads=8, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)


def make_model():
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval().to(device)


def generate(model, ids, cache, n, **more):
    return model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                          do_sample=False, **more)


class Tell(BaseStreamer):
    """Sends each token as it is known, and what another process needs to go on."""

    def __init__(self, pipe, cache):
        self.pipe, self.cache = pipe, cache

    def put(self, tokens):
        self.pipe.send((self.cache.handle(), tokens.flatten().tolist()))

    def end(self):
        pass


def worker(endpoint, prompt, pipe):
    """The process that dies."""
    model = make_model()
    client = kvpool.connect(endpoint)
    pool = client.attach("crash-resume")
    pipe.send(client.session.resume_secret)
    cache = hf.KVPoolCache(config, pool, durable=True)
    generate(model, torch.tensor(prompt, device=device), cache, TOKENS, streamer=Tell(pipe, cache))


if __name__ == "__main__":
    model = make_model()
    prompt = torch.randint(3, 1000, (1, 100), device=device)
    spec = hf.pool_spec(model, "crash-resume", pages=64, page_size=16, linger_ms=60_000)
    with kvpool.connect(backend="cuda" if device == "cuda" else "host") as client, client.create_pool(spec) as pool:
        context = multiprocessing.get_context("spawn")  # a client, and CUDA, do not outlive a fork
        pipe, theirs = context.Pipe()
        other = context.Process(target=worker, args=(client.endpoint, prompt.tolist(), theirs))
        other.start()
        secret, tokens = pipe.recv(), []
        while len(tokens) < prompt.shape[1] + TOKENS // 2:
            handle, new = pipe.recv()
            tokens += new
        other.kill()
        other.join()
        print(f"the worker is killed, with {len(tokens)} tokens known")

        client.claim(secret)
        with hf.KVPoolCache.attach(config, pool, handle) as cache:
            print(f"the keys and values of {cache.get_seq_length()} tokens are here, in {len(cache.sequences[0].pages)}"
                  " pages")
            cache.crop(min(cache.get_seq_length(), len(tokens) - 1))  # generate computes one token at least
            left = prompt.shape[1] + TOKENS - len(tokens)
            output = generate(model, torch.tensor([tokens], device=device), cache, left)

    assert torch.equal(output, generate(model, prompt, DynamicCache(config=config), TOKENS))
    print("the tokens are those of a worker that was not killed")
