"""Tiny random models, one of each family that sessions are proved for."""

from __future__ import annotations

import functools

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

COMMON = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
COMMON |= {"num_hidden_layers": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ALL = {
    "llama": ("LlamaConfig", {}),
    "llama_mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama_other": ("LlamaConfig", {"rope_theta": 5000.0}),
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {}),
}

# Those whose proof differs.
CONFIGS = [name for name in ALL if name != "llama_other"]


@functools.cache
def model(name: str, attention: str = "eager") -> PreTrainedModel:
    """The same random weights each time, fp32."""
    config_class, changes = ALL[name]
    base = {} if name == "gpt2" else COMMON
    config = getattr(transformers, config_class)(**(base | changes))
    torch.manual_seed(7)
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    # Initialised at 0.02 a tiny model hardly looks at its past: make it.
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return made


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens of a prompt."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (length,), generator=generator).tolist()
