"""The model and the prompts of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils.logging import disable_progress_bar

# Where the demo unpacks SmolLM2-135M, from the folder in which the command runs.
SMOLLM2 = Path("target/demo/smollm2-135m")
DEMO_TOKENS = 4608


def build(config: dict[str, Any], device: torch.device) -> Any:
    """The model, on its device, in eval mode."""
    shape, dtype = config["model"], getattr(torch, config["model"]["dtype"])
    if shape["weights"] == "smollm2":
        from ..demo.data import prepare

        disable_progress_bar()
        prepare(SMOLLM2, DEMO_TOKENS)
        trained: Any = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype)
        return trained.to(device).eval()
    made = LlamaConfig(
        num_hidden_layers=shape["layers"], hidden_size=shape["hidden"], intermediate_size=shape["inner"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied"],
        max_position_embeddings=config["prompt_tokens"] + config["new_tokens"],
    )  # fmt: skip
    torch.manual_seed(config["seed"])
    with torch.device(device):
        return AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation="sdpa").eval()


def prompts(config: dict[str, Any]) -> list[list[int]]:
    """Random tokens, a prompt a session."""
    generator = torch.Generator().manual_seed(config["seed"] + 1)
    shape = (config["sessions"], config["prompt_tokens"])
    return torch.randint(0, config["model"]["vocab"], shape, generator=generator).tolist()


def steering(config: dict[str, Any], device: torch.device) -> torch.Tensor | None:
    """What is added at the steered layer, if one is."""
    if config["steer_layer"] is None:
        return None
    generator = torch.Generator().manual_seed(config["seed"] + 2)
    vector = torch.randn(config["model"]["hidden"], generator=generator)
    return vector.to(device, getattr(torch, config["model"]["dtype"]))
