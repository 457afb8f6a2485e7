"""The model and its tokenizer, from a folder; SmolLM2-135M where none is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..demo.data import gguf_source, save_model


def smollm2() -> Path:
    """A folder with SmolLM2-135M (instruct, 4 bit dequantized to fp32) and its tokenizer, made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "overspill" / "smollm2-135m"
    if not (folder / "tokenizer.json").exists():
        print(f"preparing SmolLM2-135M in {folder} (once)", flush=True)
        source, gguf = gguf_source()
        save_model(folder)
        # Last: its presence says that all is there.
        AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)
    return folder


def load_model(folder: Path, device: torch.device, dtype: str | None) -> PreTrainedModel:
    """The model in ``folder``, for inference on ``device``."""
    disable_progress_bar()
    wanted: Any = dtype or ("float32" if device.type == "cpu" else "auto")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, local_files_only=True)
    return model.to(device).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``."""
    # Cleaning up would take spaces out of what was generated.
    options: Any = {"local_files_only": True, "clean_up_tokenization_spaces": False}
    return AutoTokenizer.from_pretrained(folder, **options)
