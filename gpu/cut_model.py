"""The demo's model on a machine that nothing can be fetched on: its first layers, in bf16.

usage: cut_model.py cut MODEL_DIR OUT.tar.xz [LAYERS]
       cut_model.py repeat MODEL_DIR LAYERS

The whole of SmolLM2-135M does not fit the bundle. ``cut`` keeps real weights of a model that is no longer
whole; ``repeat`` puts the same layers on top of each other until there are as many as the whole has, so that
training takes the memory that it takes there. Good for comparing bits and bytes, not for judging the text.
"""

from __future__ import annotations

import copy
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def cut(source: Path, out: Path, layers: int) -> None:
    """Writes the archive."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as folder, tarfile.open(out, "w:xz", preset=1) as archive:
        model.save_pretrained(folder)
        for path in (*Path(folder).iterdir(), *source.glob("tokens-*.pt")):
            archive.add(path, f"smollm2-135m/{path.name}")
    print(f"{out}: {layers} layers, {out.stat().st_size / 1e6:.1f} MB")


def repeat(folder: Path, layers: int) -> None:
    """Writes the model in ``folder`` anew, with its layers repeated up to ``layers``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    real = len(model.model.layers)
    model.model.layers.extend(copy.deepcopy(model.model.layers[i % real]) for i in range(layers - real))
    model.config.num_hidden_layers = layers
    model.save_pretrained(folder)
    print(f"{folder}: {real} real layers, repeated up to {layers}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["cut", source, out]:
            cut(Path(source), Path(out), 2)
        case ["cut", source, out, layers]:
            cut(Path(source), Path(out), int(layers))
        case ["repeat", folder, layers]:
            repeat(Path(folder), int(layers))
        case _:
            sys.exit(__doc__)
