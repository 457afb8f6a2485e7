"""Which models sessions are exact for, and what of a model they need to know.

Each family here is proved: ``python/tests/test_djinn_families.py`` pauses, evicts and resumes a tiny
model of it after every layer of several steps and compares logits bit by bit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from ..errors import UnsupportedModelError

# Where the decoder layers are, by `config.model_type`.
FAMILIES = {
    "gemma2": "model.layers",
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "mistral": "model.layers",
    "phi3": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
}
ATTENTION = ("eager", "sdpa")


@dataclass(frozen=True)
class ModelShape:
    """What of a model its sessions' slabs are cut to."""

    layers: torch.nn.ModuleList
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    windows: tuple[int | None, ...]

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys of one token in one layer."""
        return self.heads * self.head_dim * self.dtype.itemsize


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of ``model``.

    Raises:
        UnsupportedModelError: sessions of this kind of model have not been proved exact.
    """
    config = model.config.get_text_config(decoder=True)
    path = FAMILIES.get(config.model_type)
    if path is None:
        raise _refused(model, f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    if config._attn_implementation not in ATTENTION:
        raise _refused(
            model, f"attention {config._attn_implementation!r} is not one of {', '.join(ATTENTION)}"
        )
    if getattr(config, "add_cross_attention", False):
        raise _refused(model, "it attends to an encoder as well")
    if model.training:
        raise _refused(model, "it is in training mode; call model.eval()")
    places = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    if len(places) != 1:
        raise _refused(model, f"its parameters are on several devices or of several dtypes: {places}")
    device, dtype = places.pop()
    layers = model.get_submodule(path)
    if not isinstance(layers, torch.nn.ModuleList) or len(layers) != config.num_hidden_layers:
        raise _refused(model, f"{path} is not its list of layers")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    reference = DynamicCache(config=config).layers
    windows = tuple(getattr(layer, "sliding_window", None) for layer in reference)
    return ModelShape(layers, heads, head_dim, dtype, device, windows)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models apart whose saved sessions must not be mixed: configuration and some of every weight."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    some = [parameter.detach().flatten()[:8].to(torch.float64) for parameter in model.parameters()]
    digest.update(torch.cat(some).cpu().numpy().tobytes())
    return digest.hexdigest()


_INCIDENTAL = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "architectures")


def _refused(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"sessions of {type(model).__name__} are not proved exact: {reason}")
