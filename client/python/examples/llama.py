"""A Llama whose keys and values lie in kvpool's pages: the same tokens as with transformers' own cache.

Needs torch and transformers; runs on a GPU where there is one. The model is small and its weights are random: put
`LlamaForCausalLM.from_pretrained(...)` in its place.
"""
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvpool
from kvpool import hf

device = "cuda" if torch.cuda.is_available() else "cpu"
config = LlamaConfig(vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
                     num_attention_heads=8, num_key_value_heads=2, eos_token_id=None, pad_token_id=0)
torch.manual_seed(1)
model = LlamaForCausalLM(config).eval().to(device)

prompt = torch.randint(3, 1000, (2, 37), device=device)  # what a tokenizer makes of two texts
settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}

spec = hf.pool_spec(model, "llama", pages=64, page_size=16)
with kvpool.connect(backend="cuda" if device == "cuda" else "host") as client, client.create_pool(spec) as pool:
    with hf.KVPoolCache(config, pool) as cache:
        output = model.generate(prompt, past_key_values=cache, **settings)
        for row, seq in enumerate(cache.sequences):
            print(f"request {row}: {len(seq)} tokens in pages {seq.pages}")
    print(f"{pool.free_pages} of {pool.pages} pages are free again")

expected = model.generate(prompt, past_key_values=DynamicCache(config=config), **settings)
assert torch.equal(output, expected)
print("the tokens are those of DynamicCache")
