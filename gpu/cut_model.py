"""Cuts the demo's model to its first layers, in bf16, for a machine that nothing can be fetched on.

usage: cut_model.py MODEL_DIR OUT.tar.xz [LAYERS]

The whole of SmolLM2-135M does not fit the bundle. What is left is real weights of a model that is no
longer whole: good for comparing bits and bytes, not for judging the text.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Writes the archive."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    layers = int(sys.argv[3]) if len(sys.argv) > 3 else 2
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as folder, tarfile.open(out, "w:xz", preset=1) as archive:
        model.save_pretrained(folder)
        for path in (*Path(folder).iterdir(), *source.glob("tokens-*.pt")):
            archive.add(path, f"smollm2-135m/{path.name}")
    print(f"{out}: {layers} layers, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
