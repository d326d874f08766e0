"""One process computes a prompt, another decodes from it: its keys and values change hands without a copy.

Needs torch and transformers; runs on a GPU where there is one.
"""
import multiprocessing

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpool
from kvpool import hf

device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                     num_attention_heads=8, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)


def make_model():
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval().to(device)


def generate(model, ids, cache, n):
    return model.generate(ids, past_key_values=cache, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                          do_sample=False)


def decode(endpoint, pipe):
    """The other process."""
    model = make_model()
    with kvpool.connect(endpoint) as client, client.attach("prefill-decode") as pool:
        pipe.send(client.session.session_id)
        handle, tokens = pipe.recv()
        with hf.KVPoolCache.attach(config, pool, handle) as cache:
            print(f"decode: {cache.get_seq_length()} tokens are here, in pages {cache.sequences[0].pages}")
            pipe.send(generate(model, torch.tensor(tokens, device=device), cache, 30).tolist())


if __name__ == "__main__":
    model = make_model()
    prompt = torch.randint(3, 1000, (2, 37), device=device)
    spec = hf.pool_spec(model, "prefill-decode", pages=64, page_size=16)
    with kvpool.connect(backend="cuda" if device == "cuda" else "host") as client, client.create_pool(spec) as pool:
        context = multiprocessing.get_context("spawn")  # a client, and CUDA, do not outlive a fork
        pipe, theirs = context.Pipe()
        other = context.Process(target=decode, args=(client.endpoint, theirs))
        other.start()
        with hf.KVPoolCache(config, pool) as cache:
            first = generate(model, prompt, cache, 1)  # the prompt, and one token
            print(f"prefill: {cache.get_seq_length()} tokens, in pages {cache.sequences[0].pages}")
            handle = cache.export(to=pipe.recv())
        pipe.send((handle, first.tolist()))
        output = pipe.recv()
        other.join()

    assert output == generate(model, prompt, DynamicCache(config=config), 31).tolist()
    print("the tokens are those of one process")
