"""Small models with random weights, for the tests of kvpool.hf and the processes that they start."""
from __future__ import annotations

COMMON = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 128, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None,
          "pad_token_id": 0}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
       "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
       "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_shared_experts": 1}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "num_key_value_heads": 2}
KINDS = {"Llama": {"num_key_value_heads": 2}, "Qwen3": {"num_key_value_heads": 2, "head_dim": 24},
         "Gemma2": {**MIXED, "head_dim": 16}, "Mistral": {"num_key_value_heads": 2, "sliding_window": 8},
         "GptOss": {**MIXED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
         "DeepseekV2": {**MLA, "topk_method": "greedy"}, "DeepseekV3": MLA}


def make(kind: str = "Llama", device: str = "cpu", dtype: str = "float32"):
    """The same weights in every process."""
    import torch
    import transformers

    config = getattr(transformers, f"{kind}Config")(**COMMON, **KINDS[kind])
    torch.manual_seed(7)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    return model.to(device=device, dtype=getattr(torch, dtype))
